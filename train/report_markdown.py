"""The report of an evaluation for reading: an ordered list of sections in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from train.bootstrap import MIN_ORIGINALS, Interval
from train.calibration_report import calibration_section
from train.checkpoint import write_atomically
from train.embedding_map import embedding_map_section
from train.markdown import markdown_code, markdown_table, markdown_text, percent
from train.paper_tables import paper_section
from train.report import FIGURE_FILE, JSON_FILE, MARKDOWN_FILE, EvaluationReport, SetReport, report_json
from train.robustness_report import robustness_section
from train.saliency import saliency_section

NAMES_NOTE = (
    "`real flagged` is the share of real pictures called fake, `fake missed` the share of fakes not called fake. "
    "Liang et al. (arXiv:2403.16513) count real as the positive class: their FPR is `fake missed` and their FNR is "
    "`real flagged`, both at the uncalibrated 0.5."
)


class Section(NamedTuple):
    """A part of the report; None for the text leaves it out."""

    title: str
    text: str | None


def report_markdown(report: EvaluationReport, *, paper_tables: bool = False) -> str:
    """The report for reading.

    Args:
        report: what was found.
        paper_tables: print tables in the paper's form also where no generator is one of the paper's.
    """
    title = f"Evaluation of {Path(report.run).name} on {Path(report.data).name}, split {report.split}"
    parts = [f"# {markdown_text(title)}", _introduction(report)]
    parts += [f"## {s.title}\n\n{s.text}" for s in report_sections(report, paper_tables=paper_tables) if s.text]
    return "\n\n".join(parts) + "\n"


def report_sections(report: EvaluationReport, *, paper_tables: bool = False) -> list[Section]:
    """All sections in the order in which they are read; those without text have nothing to say here."""
    r = report
    other_families = {e.name for e in r.families} != {e.name for e in r.generators}
    return [
        Section("Over generators", _spread_table(r)),
        Section("Generators: ranking", _ranking_table(r.generators, r.trivial_auc)),
        Section("Generators: ROC", f"![ROC per generator]({FIGURE_FILE})"),
        Section("Generators: decisions", _decision_table(r.generators)),
        Section("Families: ranking", _ranking_table(r.families, {}) if other_families else None),
        Section("Families: decisions", _decision_table(r.families) if other_families else None),
        Section("As in the paper's tables", paper_section(r, wanted=paper_tables)),
        Section("Calibration", r.calibration_report and calibration_section(r.calibration_report, r.calibration)),
        Section("Robustness", r.robustness and robustness_section(r.robustness)),
        Section("Map of the embeddings", r.embedding_map and embedding_map_section(r.embedding_map)),
        Section("Where the detector looks", r.saliency and saliency_section(r.saliency)),
        Section("Where this comes from", _provenance(r)),
    ]


def write_report(report: EvaluationReport, folder: Path, *, paper_tables: bool = False) -> tuple[Path, Path]:
    """Writes JSON and Markdown, atomically, and returns their paths; arguments as for `report_markdown`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_FILE, folder / MARKDOWN_FILE
    texts = report_json(report), report_markdown(report, paper_tables=paper_tables)
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, text.encode())
    return paths


def _introduction(report: EvaluationReport) -> str:
    c = report.calibration
    return (
        f"{report.pictures:,} pictures of {len(report.generators)} generators; all figures in percent, "
        f"worst generator first, n/a where a class is missing.\n\n{NAMES_NOTE}\n\n"
        "Thresholds and calibration come from the run's validation pictures alone: `fake` above the raw logit "
        f"{c.fake_threshold:.4g} (fitted for {percent(c.real_flagged_rate)} % real flagged), `real` up to "
        f"{c.real_threshold:.4g} (fitted for {percent(c.fake_missed_rate)} % fake missed), `uncertain` between; "
        f"calibrated logit = logit / {c.temperature:.4g} + {c.bias:.4g}."
    )


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
