"""The report of an evaluation: what it holds, and its JSON, Markdown and short table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.manifest import CalibrationSpec
from runtime.strict_json import from_jsonable
from train.bootstrap import MIN_ORIGINALS, Interval
from train.calibration import CalibrationReport
from train.calibration_report import calibration_section
from train.checkpoint import write_atomically
from train.embedding_map import EmbeddingMapReport, embedding_map_markdown
from train.markdown import markdown_code, markdown_table, markdown_text, percent
from train.metrics import DetectionMetrics
from train.robustness import RobustnessReport
from train.robustness_report import robustness_section
from train.saliency import SaliencyReport, saliency_markdown

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "evaluation.json", "evaluation.md", "evaluation.png"
NAMES_NOTE = (
    "`real flagged` is the share of real pictures called fake, `fake missed` the share of fakes not called fake. "
    "Liang et al. (arXiv:2403.16513) count real as the positive class: their FPR is `fake missed` and their FNR is "
    "`real flagged`, both at the uncalibrated 0.5."
)


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


def report_markdown(report: EvaluationReport, further: Sequence[str] = ()) -> str:
    """The report for reading, with further sections before it says where it comes from."""
    c = report.calibration
    title = f"Evaluation of {Path(report.run).name} on {Path(report.data).name}, split {report.split}"
    sections = [
        f"# {markdown_text(title)}",
        f"{report.pictures:,} pictures of {len(report.generators)} generators; all figures in percent, "
        f"worst generator first, n/a where a class is missing.\n\n{NAMES_NOTE}",
        "Thresholds and calibration come from the run's validation pictures alone: `fake` above the raw logit "
        f"{c.fake_threshold:.4g} (fitted for {percent(c.real_flagged_rate)} % real flagged), `real` up to "
        f"{c.real_threshold:.4g} (fitted for {percent(c.fake_missed_rate)} % fake missed), `uncertain` between; "
        f"calibrated logit = logit / {c.temperature:.4g} + {c.bias:.4g}.",
        "## Over generators\n\n" + _spread_table(report),
        "## Generators: ranking\n\n" + _ranking_table(report.generators, report.trivial_auc),
        "## Generators: decisions\n\n" + _decision_table(report.generators),
    ]
    if {e.name for e in report.families} != {e.name for e in report.generators}:
        sections.append("## Families: ranking\n\n" + _ranking_table(report.families, {}))
        sections.append("## Families: decisions\n\n" + _decision_table(report.families))
    sections.append(f"![ROC per generator and reliability]({FIGURE_FILE})")
    if report.calibration_report is not None:
        sections.append(calibration_section(report.calibration_report, report.calibration))
    if report.robustness is not None:
        sections.append(robustness_section(report.robustness))
    sections.extend(further)
    if report.embedding_map is not None:
        sections.append(embedding_map_markdown(report.embedding_map))
    if report.saliency is not None:
        sections.append(saliency_markdown(report.saliency))
    sections.append("## Where this comes from\n\n" + _provenance(report))
    return "\n\n".join(sections) + "\n"


def write_report(report: EvaluationReport, folder: Path, further: Sequence[str] = ()) -> tuple[Path, Path]:
    """Writes JSON and Markdown, which takes further sections, atomically, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_FILE, folder / MARKDOWN_FILE
    for path, text in zip(paths, (report_json(report), report_markdown(report, further)), strict=True):
        write_atomically(path, text.encode())
    return paths


def _with_interval(share: float | None, interval: Interval | None) -> str:
    if share is None or interval is None:
        return percent(share)
    return f"{percent(share)} [{percent(interval.low)}, {percent(interval.high)}]"


def _spread_table(report: EvaluationReport) -> str:
    titles = {
        "ap": "AP (its mean is the mAP)",
        "auc": "AUC",
        "accuracy_at_half": "ACC at 0.5, uncalibrated",
        "accuracy_at_threshold": "ACC at the validation threshold",
        "real_flagged_rate": "real flagged",
        "fake_missed_rate": "fake missed",
    }
    rows = []
    for name, title in titles.items():
        s = report.spread[name]
        if s is None:
            rows.append((title, "n/a", "n/a", "n/a", "n/a", "0"))
        else:
            mean = _with_interval(s.mean, s.interval)
            rows.append((title, mean, percent(s.std), percent(s.minimum), percent(s.maximum), str(s.generators)))
    return markdown_table(("metric", "mean", "std", "min", "max", "generators"), rows)


def _ranking_table(entries: Sequence[SetReport], trivial: Mapping[str, float | None]) -> str:
    head: tuple[str, ...] = ("set", "real", "fake", "originals", "AP", "AUC", "TPR at 1 %", "TPR at 5 %", "EER")
    rows: list[tuple[str, ...]] = []
    for e in entries:
        m, i = e.metrics, e.intervals
        shares = m.tpr_at_1pct_real_flagged, m.tpr_at_5pct_real_flagged, m.eer
        ranking = _with_interval(m.ap, i.get("ap")), _with_interval(m.auc, i.get("auc"))
        rows.append((e.name, f"{m.real:,}", f"{m.fake:,}", f"{e.originals:,}", *ranking, *map(percent, shares)))
        if trivial:
            rows[-1] += (percent(trivial.get(e.name)),)
    note = (
        "TPR at 1 % and 5 %: fakes found while at most that share of this set's own real pictures is flagged. "
        "Intervals: 95 %, by resampling originals; none is given for fewer than "
        f"{MIN_ORIGINALS} originals, where it would look far too narrow. An interval without width says that no draw "
        "held an error, not that there are none."
    )
    if trivial:
        head += ("trivial AUC",)
        note += (
            " Trivial AUC: what file format, size, JPEG tables, metadata and file length alone reach on this set, "
            "cross-validated; a detector's figures mean something where they are above it (`python -m train.audit`)."
        )
    return markdown_table(head, rows) + "\n\n" + note


def _decision_table(entries: Sequence[SetReport]) -> str:
    head = (
        "set",
        "ACC thr",
        "real flagged",
        "fake missed",
        "uncertain",
        "ACC 0.5",
        "real flagged 0.5",
        "fake missed 0.5",
        "ACC calibrated 0.5",
        "ECE before",
        "ECE after",
    )
    rows = []
    for e in entries:
        m, i = e.metrics, e.intervals
        named = ("accuracy_at_threshold", "real_flagged_rate", "fake_missed_rate")
        plain = (
            m.uncertain_rate,
            m.accuracy_at_half,
            m.real_flagged_rate_at_half,
            m.fake_missed_rate_at_half,
            m.accuracy_at_calibrated_half,
            m.ece_uncalibrated,
            m.ece_calibrated,
        )
        rows.append((e.name, *(_with_interval(getattr(m, n), i.get(n)) for n in named), *map(percent, plain)))
    return markdown_table(head, rows)


def _provenance(report: EvaluationReport) -> str:
    where = report.environment
    machine = ", ".join(f"{k} {v}" for k, v in where.get("machine", {}).items())
    versions = ", ".join(f"{k} {v}" for k, v in where.get("versions", {}).items())
    return "\n".join(
        (
            f"- run: {markdown_code(report.run)}",
            f"- data: {markdown_code(report.data)}, SHA-256 of the scored pictures and labels `{report.data_sha256}`",
            f"- treatment: {report.treatment}; {report.corrupt_left_out:,} corrupt pictures left out",
            f"- tool: {where.get('tool_version')}, commit {where.get('tool_commit')}",
            f"- machine: {machine}",
            f"- versions: {versions}",
            f"- bootstrap: {report.bootstrap_draws:,} draws",
        )
    )
