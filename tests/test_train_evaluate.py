"""Evaluation of a run with an injected scorer: sets, order, thresholds, files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import GENERATOR, tiny_config, write_pictures

from runtime.errors import NTFError
from runtime.manifest import CalibrationSpec
from train.checkpoint import (
    TRAIN_GENERATORS_KEY,
    load_calibration,
    load_detector,
    load_train_generators,
    save_calibration,
)
from train.data import load_split
from train.equalize import EqualizeConfig
from train.errors import CheckpointError, ConfigError, DataError
from train.evaluate import evaluate_run, main
from train.evaluation_config import EvaluationConfig
from train.evaluation_figures import FigureConfig
from train.loss_backend import choose_loss_backend
from train.metrics import detection_metrics
from train.pictures import PictureRecord, PictureSet
from train.report import report_from_jsonable
from train.report_markdown import report_sections
from train.robustness import RobustnessConfig
from train.run import train, write_config
from train.scoring import preprocess_spec, score_images, score_pictures
from train.session import TrainingData
from train.variants import VariantDataset, variant_logits

SPEC = CalibrationSpec(2.0, 0.1, -1.0, 1.0, 0.01, 0.05)


def write_set(root: Path, generators: dict[str, tuple[int, int]]) -> None:
    """`{generator: (reals, fakes)}` below `test/`; each picture's first pixel is its number."""
    rows = ["path,family,original_id"]
    for generator, counts in generators.items():
        for label, folder in enumerate(("0_real", "1_fake")):
            for number in range(counts[label]):
                path = root / "test" / generator / folder / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2), (number, label, len(generator))).save(path)
                family = "gan" if "gan" in generator else "diffusion"
                rows.append(f"{path.relative_to(root).as_posix()},{family},{generator}-{number}")
    (root / "sources.csv").write_text("\n".join(rows) + "\n")


def scorer(gaps: dict[str, float]) -> Callable[[Sequence[PictureRecord]], np.ndarray]:
    """Logits whose distance between the classes is the generator's gap."""

    def score(records: Sequence[PictureRecord]) -> np.ndarray:
        rng = np.random.default_rng(0)
        noise = rng.normal(0, 1, len(records))
        return (noise + [gaps[r.generator] * (r.label - 0.5) for r in records]).astype(np.float32)

    return score


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    save_calibration(folder, SPEC)
    return folder


def test_report_has_every_generator_worst_first_and_every_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "data", {"easygan": (30, 30), "hardgan": (30, 30), "sd": (30, 30)})
    gaps = {"easygan": 6.0, "hardgan": 0.5, "sd": 2.0}
    report = evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=200), scorer=scorer(gaps))
    assert [g.name for g in report.generators] == ["hardgan", "sd", "easygan"]
    assert {f.name: f.metrics.pictures for f in report.families} == {"gan": 120, "diffusion": 60}
    aps = [g.metrics.ap for g in report.generators]
    spread = report.spread["ap"]
    assert spread is not None
    assert spread.mean == pytest.approx(np.mean(aps))
    assert (spread.std, spread.minimum) == (pytest.approx(np.std(aps)), aps[0])
    assert spread.interval is not None
    assert spread.interval.low < spread.mean < spread.interval.high
    assert report.calibration == SPEC
    assert sorted(p.name for p in (run / "report").iterdir()) == [
        "calibration.png",
        "evaluation.html",
        "evaluation.json",
        "evaluation.md",
        "evaluation.png",
    ]
    page = (run / "report/evaluation.html").read_text(encoding="utf-8")
    assert "<td>hardgan</td>" in page
    assert 'alt="ROC per generator"' in page
    assert "180 pictures, 90 real, 90 fake" in capsys.readouterr().out


def test_what_was_found_is_printed_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "data", {"sd": (2, 2)})

    def fail(records: Sequence[PictureRecord]) -> np.ndarray:
        raise RuntimeError("scoring")

    with pytest.raises(RuntimeError, match="scoring"):
        evaluate_run(run, tmp_path / "data", scorer=fail)
    assert "4 pictures, 2 real, 2 fake" in capsys.readouterr().out


def test_set_of_one_class_is_last_and_outside_the_means(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (12, 12), "photos": (12, 0)})
    report = evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=50), scorer=scorer({"sd": 3.0, "photos": 3.0}))
    assert [(g.name, g.metrics.ap is None) for g in report.generators] == [("sd", False), ("photos", True)]
    spread = report.spread["accuracy_at_threshold"]
    assert spread is not None
    assert (spread.generators, spread.mean) == (1, report.generators[0].metrics.accuracy_at_threshold)
    assert "| photos | 12 | 0 | 12 | n/a | n/a |" in (run / "report/evaluation.md").read_text()


def test_few_originals_get_no_interval(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (5, 5)})
    report = evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=50), scorer=scorer({"sd": 1.0}))
    assert set(report.generators[0].intervals.values()) == {None}
    spread = report.spread["ap"]
    assert spread is not None
    assert spread.interval is None


def test_thresholds_do_not_follow_the_test_pictures(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (20, 20)})

    def far(records: Sequence[PictureRecord]) -> np.ndarray:
        return np.array([5.0 + r.label for r in records], np.float32)

    report = evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=10), scorer=far)
    metrics = report.generators[0].metrics
    assert (metrics.ap, metrics.real_flagged_rate, metrics.accuracy_at_threshold) == (1.0, 1.0, 0.5)


def test_collection_without_splits_is_scored_as_all(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (3, 3)})
    bare = tmp_path / "data" / "test"
    with pytest.raises(DataError, match=r"split 'test' of .*splits there: none"):
        evaluate_run(run, bare, scorer=scorer({"sd": 1.0}))
    report = evaluate_run(run, bare, EvaluationConfig(split="all", draws=10), scorer=scorer({"sd": 1.0}))
    assert (report.pictures, report.split) == (6, "all")


def test_report_goes_where_it_is_asked_to_go(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (3, 3)})
    evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=10), out=tmp_path / "out", scorer=scorer({"sd": 1.0}))
    assert (tmp_path / "out" / "evaluation.json").is_file()
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere", "--data", "gone"], "nowhere: got no such folder"),
        (["--run", "RUN", "--data", "gone"], "picture collection gone: got nothing at that path"),
    ],
)
def test_command_line_explains_what_is_missing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (FigureConfig(tsne=True), "--tsne: got 6 pictures"),
        (FigureConfig(tsne_seed=-1), "--tsne-seed: got -1"),
        (FigureConfig(gradcam_pictures=0), "--gradcam-pictures: got 0"),
    ],
)
def test_figure_that_cannot_be_made_is_refused_before_scoring(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: FigureConfig, message: str
) -> None:
    write_set(tmp_path / "data", {"sd": (3, 3)})

    def fail(run: Path) -> None:
        raise AssertionError("opened the detector")

    monkeypatch.setattr("train.evaluate.load_detector", fail)
    with pytest.raises(NTFError, match=message):
        evaluate_run(run, tmp_path / "data", EvaluationConfig(figures=figures))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of the tiny model, and its pictures."""
    root = tmp_path_factory.mktemp("trained")
    data = write_pictures(root / "data", counts={"train": 12, "val": 12, "test": 6})
    run = root / "runs" / "tiny"
    run.mkdir(parents=True)
    train(tiny_config(data), run)
    return run, data


@pytest.fixture(scope="module")
def evaluated(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a report with every section, and what the command line printed."""
    run, data = trained
    out = tmp_path_factory.mktemp("report")
    asked = (
        "--draws 20 --no-progress --real-flagged-rates 0.1 0.01 --paper-tables --tsne --gradcam --gradcam-pictures 2 "
        "--robustness --robustness-operations blur jpeg --robustness-blur 0 1 --robustness-jpeg 40"
    )
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["--run", str(run), "--data", str(data), "--out", str(out), *asked.split()]) == 0
    return out, printed.getvalue()


def test_command_line_scores_with_the_trained_detector(trained: tuple[Path, Path], evaluated: tuple[Path, str]) -> None:
    folder, data = trained
    out, printed = evaluated
    assert "mean over generators" in printed
    assert "robustness: 12 of 12 pictures, 2 variants of each" in printed
    written = json.loads((out / "evaluation.json").read_text())
    detector, records = load_detector(folder), load_split(data, "test").records
    logits = score_pictures(detector, records, progress=False).logits
    expected = detection_metrics(logits, np.array([r.label for r in records]), calibration=load_calibration(folder))
    assert written["generators"][0]["metrics"]["auc"] == pytest.approx(expected.auc)
    assert written["data_sha256"] == load_split(data, "test").content_sha256()
    report = report_from_jsonable(written, subject="report")
    assert report.robustness is not None
    for curve in report.robustness.curves:  # untouched: the plain evaluation, to the bit
        mean = asdict(curve.points[0].mean)
        assert {n: s.mean for n, s in report.spread.items() if s is not None and n in mean}.items() <= mean.items()
        assert curve.points[1].mean.logit_change > 0
    assert report.calibration_report is not None
    assert report.calibration_report.thresholds is not None
    assert [row.needed for row in report.calibration_report.thresholds.rows] == [10, 100]


def test_every_section_stands_in_every_form_of_the_report(
    trained: tuple[Path, Path], evaluated: tuple[Path, str]
) -> None:
    (_, data), (out, printed) = trained, evaluated
    pictures = ["calibration.png", "embedding_map.png", "evaluation.png", "robustness.png", "saliency.png"]
    others = ["embedding_map.json", "evaluation.html", "evaluation.json", "evaluation.md", "saliency.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(pictures + others)
    assert all(str(path) in printed for path in out.iterdir())
    report = json.loads((out / "evaluation.json").read_text())
    mapped = json.loads((out / "embedding_map.json").read_text())
    sheet = json.loads((out / "saliency.json").read_text())
    assert report["embedding_map"] == mapped["report"]
    assert report["saliency"] == sheet["report"]
    assert mapped["report"]["generators"][0]["seen_in_training"] is True
    assert [(p["label"], p["generator"]) for p in sheet["pictures"]] == [(0, GENERATOR)] * 2 + [(1, GENERATOR)] * 2
    assert all((data / point["id"]).is_file() for point in mapped["points"] if point["kind"] != "mean trace")
    assert all((data / picture["id"]).is_file() for picture in sheet["pictures"])
    text, page = ((out / f"evaluation.{form}").read_text(encoding="utf-8") for form in ("md", "html"))
    assert all(f"({name})" in text for name in pictures)
    assert page.count('src="data:image/png;base64,') == len(pictures)
    sections = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    read = report_from_jsonable(report, subject="report")
    assert sections == [s.title for s in report_sections(read, paper_tables=True) if s.text]
    assert {"Calibration", "Robustness", "Map of the embeddings", "Where the detector looks"} <= set(sections)
    assert "As in the paper's tables" in sections
    page = unescape(page)
    for section in sections:
        assert f">{section}</a>" in page
        assert f">{section}</h2>" in page


def test_identity_gives_the_logits_of_the_trained_detector_to_the_bit(trained: tuple[Path, Path]) -> None:
    folder, data = trained
    detector, records = load_detector(folder), load_split(data, "test").records
    dataset = VariantDataset(records, [("blur", 1.0), ("noise", 0.0)], preprocess_spec(detector.encoder))
    logits = variant_logits(dataset, lambda images: score_images(detector, images).logits, batch_size=5, progress=False)
    plain = score_pictures(detector, records, batch_size=5, progress=False).logits
    assert np.array_equal(logits[1], plain)
    assert not np.array_equal(logits[0], plain)


def test_rates_asked_of_a_run_without_validation_scores_are_refused(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {"sd": (3, 3)})
    with pytest.raises(CheckpointError, match=r"got a run without validation_scores.json"):
        evaluate_run(run, tmp_path / "data", EvaluationConfig(real_flagged_rates=(0.1,)), scorer=scorer({"sd": 1.0}))
    report = evaluate_run(run, tmp_path / "data", EvaluationConfig(draws=10), scorer=scorer({"sd": 1.0}))
    assert report.calibration_report is not None
    assert report.calibration_report.thresholds is None
    assert report.robustness is None


@pytest.mark.parametrize(
    "config",
    [
        EvaluationConfig(robustness=RobustnessConfig(enabled=True)),
        EvaluationConfig(figures=FigureConfig(tsne=True)),
        EvaluationConfig(figures=FigureConfig(gradcam=True)),
    ],
)
def test_second_look_with_another_scorer_is_refused(run: Path, tmp_path: Path, config: EvaluationConfig) -> None:
    with pytest.raises(ConfigError, match="robustness, tsne and gradcam: got a scorer, wanted the run's own detector"):
        evaluate_run(run, tmp_path, config, scorer=scorer({}))


def test_every_option_has_a_plain_name_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "--split all --corrupt skip --equalize --equalize-size 64 --cache-dir store --real-flagged-rates 0.1 0.2 "
        "--robustness --robustness-operations blur --robustness-blur 1 --robustness-pictures 5 --robustness-seed 3 "
        "--tsne --tsne-pictures 50 --tsne-seed 2 --gradcam --gradcam-pictures 4 --paper-tables --batch-size 8 "
        "--workers 1 --draws 9"
    )
    asked: list[EvaluationConfig] = []
    monkeypatch.setattr("train.evaluate.evaluate_run", lambda run, data, config, **_: asked.append(config))
    monkeypatch.setattr("train.evaluate.short_table", lambda report: "")
    assert main(["--run", str(tmp_path), "--data", str(tmp_path), *given.split()]) == 0
    assert asked == [
        EvaluationConfig(
            split="all",
            corrupt="skip",
            equalize=EqualizeConfig(enabled=True, size=64),
            cache_dir=Path("store"),
            real_flagged_rates=(0.1, 0.2),
            robustness=RobustnessConfig(enabled=True, operations=("blur",), blur=(1.0,), pictures=5, seed=3),
            figures=FigureConfig(tsne=True, tsne_pictures=50, tsne_seed=2, gradcam=True, gradcam_pictures=4),
            paper_tables=True,
            batch_size=8,
            workers=1,
            draws=9,
        )
    ]


def test_run_records_the_generators_whose_fakes_it_was_trained_on(tmp_path: Path) -> None:
    records = tuple(
        PictureRecord(tmp_path / f"{n}.png", label, generator, generator, f"{n}", "train")
        for n, (generator, label) in enumerate([("sd", 1), ("sd", 0), ("photos", 0)])
    )
    pictures = PictureSet(tmp_path, "list", records)
    data = TrainingData(pictures, pictures, {}, ())
    write_config(tmp_path, tiny_config(tmp_path), data, choose_loss_backend("reference", "cpu"))
    assert load_train_generators(tmp_path) == ("sd",)
    recorded = json.loads((tmp_path / "config.json").read_text())
    del recorded["data"][TRAIN_GENERATORS_KEY]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    assert load_train_generators(tmp_path) is None
