"""The report of an evaluation: what it holds, its JSON and its short table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from runtime.manifest import CalibrationSpec
from runtime.strict_json import from_jsonable
from train.bootstrap import Interval
from train.calibration import CalibrationReport
from train.embedding_map import EmbeddingMapReport
from train.markdown import percent
from train.metrics import DetectionMetrics
from train.robustness import RobustnessReport
from train.saliency import SaliencyReport

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "evaluation.json", "evaluation.md", "evaluation.png"


@dataclass(frozen=True)
class SetReport:
    """Figures of one generator or family.

    Attributes:
        name: the generator or family.
        originals: distinct original pictures in it.
        metrics: its figures.
        intervals: 95 % bootstrap intervals over originals, None where there are too few originals or classes.
    """

    name: str
    originals: int
    metrics: DetectionMetrics
    intervals: dict[str, Interval | None]


@dataclass(frozen=True)
class Spread:
    """One metric over the generators for which it is defined, each counted once."""

    mean: float
    std: float  # of the generators themselves, not an estimate for others
    minimum: float
    maximum: float
    generators: int
    interval: Interval | None  # of the mean


@dataclass(frozen=True)
class EvaluationReport:
    """Everything an evaluation found.

    Attributes:
        run: folder of the run.
        data: collection that was scored.
        split: its split, or "all".
        data_sha256: hash over the scored pictures and labels.
        pictures: how many were scored.
        calibration: from the run's validation pictures.
        generators: worst average precision first, sets of one class last.
        families: likewise.
        spread: mean, standard deviation, smallest and largest over generators; "ap" gives the mAP.
        bootstrap_draws: resamplings behind the intervals.
        treatment: what was done to both classes before they were scored, in words.
        corrupt_left_out: pictures that were left out because they cannot be decoded.
        trivial_auc: by generator, what features alone reach that have nothing to do with synthesis (`train.audit`);
            None where a class is missing or has too few originals.
        environment: tool, machine and versions.
        calibration_report: how well probabilities and wanted rates hold; None in reports from before it existed.
        robustness: what happens when pictures are changed; None where that was not asked for.
        embedding_map: t-SNE beside the natural traces; None where it was not asked for.
        saliency: Grad-CAM++ beside the evidence; None where it was not asked for.
    """

    run: str
    data: str
    split: str
    data_sha256: str
    pictures: int
    calibration: CalibrationSpec
    generators: tuple[SetReport, ...]
    families: tuple[SetReport, ...]
    spread: dict[str, Spread | None]
    bootstrap_draws: int
    treatment: str
    corrupt_left_out: int
    trivial_auc: dict[str, float | None]
    environment: dict[str, Any]
    calibration_report: CalibrationReport | None = None
    robustness: RobustnessReport | None = None
    embedding_map: EmbeddingMapReport | None = None
    saliency: SaliencyReport | None = None


def report_json(report: EvaluationReport) -> str:
    """The whole report as JSON; figures are shares in 0..1, undefined ones null."""
    return json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n"


def report_from_jsonable(values: object, *, subject: str) -> EvaluationReport:
    """A report from plain JSON types; what reports did not say yet when it was written counts as not known.

    Raises:
        BundleError: an unknown field, a missing one or a value of another type.
    """
    if isinstance(values, dict):
        values = {
            "treatment": "pictures as they are stored",
            "corrupt_left_out": 0,
            "trivial_auc": {},
            "calibration_report": None,
            "robustness": None,
            "embedding_map": None,
            "saliency": None,
        } | values
    return from_jsonable(EvaluationReport, values, subject=subject)


def short_table(report: EvaluationReport) -> str:
    """One line per generator, worst first, and their means; figures in percent."""
    head = ("generator", "real", "fake", "AP", "AUC", "ACC 0.5", "ACC thr", "real flagged", "fake missed")
    rows: list[tuple[str, ...]] = [head]
    for entry in report.generators:
        m = entry.metrics
        shares = (
            m.ap,
            m.auc,
            m.accuracy_at_half,
            m.accuracy_at_threshold,
            m.real_flagged_rate,
            m.fake_missed_rate,
        )
        rows.append((entry.name, f"{m.real:,}", f"{m.fake:,}", *map(percent, shares)))
    names = ("ap", "auc", "accuracy_at_half", "accuracy_at_threshold", "real_flagged_rate", "fake_missed_rate")
    spreads = [report.spread[name] for name in names]
    rows.append(("mean over generators", "", "", *(percent(s.mean if s else None) for s in spreads)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
