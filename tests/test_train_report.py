"""JSON, Markdown, short table and figure of an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import BundleError
from runtime.manifest import CalibrationSpec
from runtime.strict_json import from_jsonable
from train.bootstrap import METRICS, Interval
from train.markdown import percent
from train.metrics import detection_metrics
from train.report import (
    EvaluationReport,
    SetReport,
    Spread,
    report_from_jsonable,
    report_json,
    short_table,
)
from train.report_figure import write_figure
from train.report_markdown import report_markdown, report_sections, write_report

SPEC = CalibrationSpec(2.0, 0.25, -1.0, 1.0, 0.01, 0.05)
LABELS = np.repeat([0, 1], 4)


def entry(name: str, logits: list[float], interval: Interval | None = None) -> SetReport:
    metrics = detection_metrics(np.array(logits), LABELS[: len(logits)], calibration=SPEC)
    return SetReport(name, 8, metrics, dict.fromkeys(METRICS, interval))


@pytest.fixture
def report() -> EvaluationReport:
    good = entry("good", [-3, -2, -2, -1, 1, 2, 2, 3], Interval(0.9, 1.0))
    poor = entry("poor|x", [-3, 2, -2, 3, 1, -2, 2, 4])
    bare = entry("bare", [-3, 2, -2, 3])
    spread = Spread(0.875, 0.125, 0.75, 1.0, 2, None)
    return EvaluationReport(
        run="runs/one",
        data="data/demo",
        split="test",
        data_sha256="ab" * 32,
        pictures=20,
        calibration=SPEC,
        generators=(poor, good, bare),
        families=(poor, good, bare),
        spread={**dict.fromkeys(METRICS, spread), "auc": None},
        bootstrap_draws=1000,
        treatment="pictures as they are stored",
        corrupt_left_out=3,
        trivial_auc={"poor|x": 0.75, "good": 0.5, "bare": None},
        environment={
            "tool_version": "0.1.0",
            "tool_commit": "c0ffee",
            "machine": {"cpu": "some CPU", "cores": 2},
            "versions": {"torch": "2.14.1"},
        },
    )


def test_report_comes_back_from_its_json(report: EvaluationReport) -> None:
    assert from_jsonable(EvaluationReport, json.loads(report_json(report)), subject="report") == report


def test_json_holds_everything_and_null_where_undefined(report: EvaluationReport) -> None:
    loaded = json.loads(report_json(report))
    assert loaded["run"] == "runs/one"
    assert loaded["data_sha256"] == "ab" * 32
    assert loaded["environment"]["machine"]["cpu"] == "some CPU"
    assert loaded["environment"]["versions"] == {"torch": "2.14.1"}
    assert loaded["calibration"]["temperature"] == 2.0
    assert [g["name"] for g in loaded["generators"]] == ["poor|x", "good", "bare"]
    assert loaded["generators"][2]["metrics"]["ap"] is None
    assert loaded["generators"][1]["intervals"]["ap"] == {"low": 0.9, "high": 1.0}


def test_markdown_maps_the_rates_to_the_papers_names(report: EvaluationReport) -> None:
    text = report_markdown(report)
    assert "their FPR is `fake missed` and their FNR is `real flagged`" in text
    assert "Thresholds and calibration come from the run's validation pictures alone" in text


def test_markdown_prints_not_available_for_one_class(report: EvaluationReport) -> None:
    line = next(line for line in report_markdown(report).splitlines() if line.startswith("| bare |"))
    assert line == "| bare | 4 | 0 | 8 | n/a | n/a | n/a | n/a | n/a | n/a |"


def test_markdown_prints_intervals_and_keeps_columns_apart(report: EvaluationReport) -> None:
    text = report_markdown(report)
    assert "| good | 4 | 4 | 8 | 100.0 [90.0, 100.0] |" in text
    assert "| poor\\|x |" in text


def test_trivial_auc_stands_beside_the_detectors_and_what_was_done_is_said(report: EvaluationReport) -> None:
    text = report_markdown(report)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| set | real | fake | originals"))
    assert head.endswith("| EER | trivial AUC |")
    assert next(line for line in lines if line.startswith("| poor")).endswith("| 75.0 |")
    assert "treatment: pictures as they are stored; 3 corrupt pictures left out" in text


def test_report_from_before_a_field_existed_is_read_with_what_was_true_then(report: EvaluationReport) -> None:
    values = json.loads(report_json(report))
    added = ("calibration_report", "robustness", "embedding_map", "saliency")
    for name in ("treatment", "corrupt_left_out", "trivial_auc", *added):
        del values[name]
    read = report_from_jsonable(values, subject="report")
    assert (read.treatment, read.corrupt_left_out, read.trivial_auc) == ("pictures as they are stored", 0, {})
    assert [getattr(read, name) for name in added] == [None] * 4
    del values["pictures"]
    with pytest.raises(BundleError, match="report: got no field 'pictures'"):
        report_from_jsonable(values, subject="report")


def test_markdown_names_machine_versions_commit_and_data(report: EvaluationReport) -> None:
    text = report_markdown(report)
    for part in ("cpu some CPU, cores 2", "torch 2.14.1", "commit c0ffee", "ab" * 32, "1,000 draws"):
        assert part in text


def test_families_are_shown_only_where_they_differ(report: EvaluationReport) -> None:
    assert "## Families" not in report_markdown(report)
    other = replace(report, families=(entry("gan", [-3, 2, -2, 3, 1, -2, 2, 4]),))
    assert "## Families: ranking" in report_markdown(other)
    assert "| gan |" in report_markdown(other)


def test_sections_stand_in_their_order_and_those_without_text_are_left_out(report: EvaluationReport) -> None:
    sections = report_sections(report, paper_tables=True)
    titles = [section.title for section in sections]
    assert titles[0] == "Over generators"
    assert titles[-1] == "Where this comes from"
    absent = {"Families: ranking", "Families: decisions", "Calibration", "Robustness"}
    absent |= {"Map of the embeddings", "Where the detector looks"}
    assert {section.title for section in sections if section.text is None} == absent
    lines = report_markdown(report, paper_tables=True).splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == [t for t in titles if t not in absent]


def test_short_table_is_aligned_and_ends_with_the_means(report: EvaluationReport) -> None:
    lines = short_table(report).splitlines()
    assert lines[0].split()[:3] == ["generator", "real", "fake"]
    assert [line.split()[0] for line in lines[1:]] == ["poor|x", "good", "bare", "mean"]
    assert lines[-1].split()[-6:] == ["87.5", "n/a", "87.5", "87.5", "87.5", "87.5"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(("share", "text"), [(None, "n/a"), (0.0, "0.0"), (1.0, "100.0"), (0.12345, "12.3")])
def test_shares_are_printed_in_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_report_is_written_whole(report: EvaluationReport, tmp_path: Path) -> None:
    json_path, markdown_path = write_report(report, tmp_path / "new" / "report")
    assert json_path.read_text(encoding="utf-8") == report_json(report)
    assert markdown_path.read_text(encoding="utf-8") == report_markdown(report)
    assert sorted(p.name for p in json_path.parent.iterdir()) == ["evaluation.json", "evaluation.md"]


@pytest.mark.parametrize("generators", [1, 30])
def test_figure_is_a_picture_for_few_and_many_generators(tmp_path: Path, generators: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 20 * generators)
    rows = {f"_g${i}": np.arange(40 * i, 40 * i + 40) for i in range(generators)}
    rows["one class"] = np.arange(0, 40, 2)
    write_figure(tmp_path / "f.png", rng.normal(labels), labels, rows)
    with Image.open(tmp_path / "f.png") as figure:
        assert min(figure.size) > 700
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 20
