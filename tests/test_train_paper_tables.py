"""The paper's figures as printed, their averages derived again, and our figures in the form of its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_train_report import SPEC, entry

from train.bootstrap import METRICS
from train.evaluate import main
from train.evaluation_config import EvaluationConfig
from train.metrics import detection_metrics
from train.paper_tables import ALIASES, paper_columns, paper_figures, paper_name, paper_section
from train.report import EvaluationReport, SetReport
from train.report_markdown import report_markdown

# Averages that the paper prints otherwise than the unweighted means of its own columns: rounded down in the last digit,
# or of other sets (its starred methods leave out faces, and nothing explains Xception's on diffusion models).
OTHER_AVERAGES = {
    (2, "SBIs*", "FPR"): (41.8, 50.6),
    (2, "SBIs*", "FNR"): (41.9, 39.0),
    (2, "CADDM*", "AP"): (52.1, 51.4),
    (2, "CADDM*", "ACC"): (53.3, 51.6),
    (2, "CADDM*", "FPR"): (48.4, 51.4),
    (2, "CADDM*", "FNR"): (45.0, 45.4),
    (3, "Xception", "AP"): (66.2, 67.7),
    (3, "Xception", "FPR"): (14.0, 42.4),
    (3, "Xception", "FNR"): (59.0, 43.7),
    (3, "Wang2020", "AP"): (54.6, 54.7),
    (3, "Ojha2023", "FNR"): (6.3, 6.4),
    (3, "NTF", "AP"): (91.2, 91.1),
    (4, "SBIs*", "FPR"): (44.4, 44.5),
    (4, "CADDM*", "ACC"): (48.2, 48.3),
}


def evaluation(*entries: SetReport) -> EvaluationReport:
    return EvaluationReport(
        run="runs/one",
        data="data/demo",
        split="test",
        data_sha256="ab" * 32,
        pictures=20,
        calibration=SPEC,
        generators=entries,
        families=entries,
        spread=dict.fromkeys(METRICS),
        bootstrap_draws=10,
        treatment="pictures as they are stored",
        corrupt_left_out=0,
        trivial_auc={},
        environment={},
    )


def figures(number: int, method: str) -> np.ndarray:
    table = next(table for table in paper_figures().tables if table.number == number)
    return np.array(next(row.figures for row in table.methods if row.name == method))


def test_every_printed_average_is_the_unweighted_mean_but_for_those_named() -> None:
    other = {}
    for table in paper_figures().tables[:3]:
        for method in table.methods:
            assert method.average is not None
            means = np.mean(method.figures, axis=0)
            for column, mean, printed in zip(table.columns, means, method.average, strict=True):
                if abs(mean - printed) > 0.0501:
                    other[table.number, method.name, column] = (printed, pytest.approx(mean, abs=0.051))
    assert other == OTHER_AVERAGES


def test_overall_figures_of_the_text_come_out() -> None:
    ours = np.concatenate([figures(number, "NTF") for number in (2, 3, 4)])
    assert len(ours) == 18
    assert ours[:, 0].mean() == pytest.approx(96.1, abs=0.05)
    assert ours[:, 1].mean() == pytest.approx(87.8, abs=0.05)
    assert [figures(n, "NTF")[:, 0].mean().round(1) for n in (2, 3, 4)] == [99.9, 91.1, 97.3]


@pytest.mark.parametrize(
    ("number", "method", "generator", "row"),
    [
        (2, "NTF", "ProGAN", (100.0, 92.5, 0.0, 14.9)),
        (2, "Ojha2023", "Diff-StyleGAN2", (64.6, 64.9, 69.3, 0.8)),
        (3, "Grag2021", "SDM", (98.2, 63.6, 72.9, 0.0)),
        (3, "NTF", "DDPM", (76.9, 68.8, 47.2, 15.3)),
        (4, "Xception", "DiffFace_LDM", (38.0, 50.0, 100.0, 0.0)),
        (4, "NTF", "DiffFace_LDM", (84.6, 74.3, 35.6, 15.8)),
        (5, "NTF", "Kolors", (78.12,)),
        (5, "Wang2020", "Midjourney", (63.02,)),
    ],
)
def test_figures_are_those_that_the_paper_prints(number: int, method: str, generator: str, row: tuple) -> None:
    table = paper_figures().tables[number - 2]
    assert tuple(figures(number, method)[table.generators.index(generator)]) == row


def test_every_table_is_complete() -> None:
    assert [t.number for t in paper_figures().tables] == [2, 3, 4, 5]
    for table in paper_figures().tables:
        for method in table.methods:
            assert np.shape(method.figures) == (len(table.generators), len(table.columns))
            assert np.all((np.array(method.figures) >= 0) & (np.array(method.figures) <= 100))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("progan", "ProGAN"),
        ("diff-stylegan2", "Diff-StyleGAN2"),
        ("SimSwap-VQGAN", "SimSwap_VQ"),
        ("Stable Diffusion", "SDM"),
        ("stable_diffusion_v_1_4", None),
        ("transposed_conv", None),
    ],
)
def test_generators_are_known_by_name_and_alias(name: str, expected: str | None) -> None:
    assert paper_name(name) == expected


def test_every_alias_leads_to_a_generator_of_the_paper() -> None:
    known = {name for table in paper_figures().tables for name in table.generators}
    assert set(ALIASES.values()) <= known
    assert all(paper_name(alias) == name for alias, name in ALIASES.items())


def test_papers_rates_are_ours_with_real_as_the_positive_class() -> None:
    labels = np.repeat([0, 1], [4, 5])
    logits = np.array([1.0, -1, -2, -3, 5, 6, 7, -4, -5])  # one real flagged, two fakes missed
    columns = paper_columns(detection_metrics(logits, labels, calibration=SPEC))
    assert (columns["FPR"], columns["FNR"], columns["ACC"]) == (2 / 5, 1 / 4, 6 / 9)


def cells(section: str, row: str) -> list[str]:
    line = next(line for line in section.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_our_row_stands_above_the_papers_for_the_generators_that_both_have() -> None:
    mixed = evaluation(
        entry("ldm", [-3, -2, -2, -1, 1, 2, 2, 3]),
        entry("DDIM", [-3, 2, -2, 3, 1, -2, 2, 4]),
        entry("mystery", [-3, 2, -2, 3]),
    )
    section = paper_section(mixed)
    assert section is not None
    assert "its FPR is our `fake missed`" in section
    assert "LDM is our `ldm`; without DDPM, PNDM, SDM, DiffFace, of which there are no pictures here." in section
    head = cells(section, "method")
    assert head[1:5] == ["DDIM AP", "DDIM ACC", "DDIM FPR", "DDIM FNR"]
    assert head[9:] == ["Average AP", "Average ACC", "Average FPR", "Average FNR"]
    assert cells(section, "ours")[2:9] == ["62.5", "25.0", "50.0", "100.0", "100.0", "0.0", "0.0"]
    assert " ".join(cells(section, "NTF")) == "NTF 91.8 84.1 16.4 15.5 99.9 92.7 0.1 14.7 95.9 88.4 8.2 15.1"
    assert "Table 2" not in section
    assert "### Generators that the paper does not have" in section
    assert "mystery AP" in section
    assert f"## As in the paper's tables\n\n{section}" in report_markdown(mixed)


def test_our_figures_alone_are_printed_when_asked_and_say_so() -> None:
    others = evaluation(entry("one", [-3, -2, -2, -1, 1, 2, 2, 3]), entry("bare", [-3, 2, -2, 3]))
    assert paper_section(others) is None
    section = paper_section(others, wanted=True)
    assert section is not None
    assert section in report_markdown(others, paper_tables=True)
    assert section not in report_markdown(others)
    assert "None of the generators is one of the paper's" in section
    assert cells(section, "ours")[-4:] == ["n/a", "75.0", "n/a", "25.0"]  # one set has no fakes
    assert "| NTF |" not in section


def test_command_line_adds_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluationConfig] = []
    monkeypatch.setattr("train.evaluate.evaluate_run", lambda run, data, config, **_: asked.append(config))
    monkeypatch.setattr("train.evaluate.short_table", lambda report: "")
    assert main(["--run", str(tmp_path), "--data", str(tmp_path), "--paper-tables"]) == 0
    assert [config.paper_tables for config in asked] == [True]
