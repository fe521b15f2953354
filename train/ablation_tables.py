"""The report of a study as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from train.ablation_report import (
    FINAL,
    OVER_GENERATORS,
    VALIDATION,
    AblationReport,
    Figure,
    VariantReport,
)
from train.bootstrap import METRICS
from train.checkpoint import write_atomically
from train.markdown import markdown_table, percent

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "ablation.json", "ablation.md", "ablation.png"
TITLES = {
    "ap": "AP",
    "auc": "AUC",
    "accuracy_at_half": "ACC 0.5",
    "accuracy_at_threshold": "ACC thr",
    "real_flagged_rate": "real flagged",
    "fake_missed_rate": "fake missed",
}


def ablation_json(report: AblationReport) -> str:
    """The whole report as JSON; figures are shares in 0..1, undefined ones null."""
    return json.dumps(asdict(report) | {"failed": report.failed}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def ablation_markdown(report: AblationReport) -> str:
    """The report for reading."""
    runs = len(report.variants) * len(report.seeds)
    sections = [
        f"# Study {report.study} on {Path(report.data).name}",
        f"{len(report.variants)} variants with the seeds {', '.join(map(str, report.seeds))}: {runs} runs, "
        f"{report.failed or 'none'} of them failed. Figures in percent: mean ± standard deviation over seeds; "
        "the standard deviation is of the runs, and says nothing of other pictures.",
        "## Chosen on validation\n\n" + choice(report),
    ]
    for split in report.splits:
        title = "Validation pictures" if split == VALIDATION else "Test pictures"
        sections.append(f"## {title}: {OVER_GENERATORS}\n\n" + _over_table(report, split))
        sections += [
            f"## {title}: {TITLES[metric]} by generator\n\n" + _generator_table(report, split, metric)
            for metric in ("ap", "accuracy_at_half")
        ]
    if FINAL not in report.splits:
        sections.append("The test pictures were not looked at; `--final` evaluates them, when all choices are made.")
    sections += [f"![AP and accuracy by generator]({FIGURE_FILE})", "## Variants\n\n" + _variant_table(report)]
    failures = [f"- {v.name}, seed {r.seed}: {r.failure}" for v in report.variants for r in v.runs if r.failure]
    if failures:
        sections.append("## FAILED\n\n" + "\n".join(failures))
    sections.append("## Where this comes from\n\n" + _provenance(report))
    return "\n\n".join(sections) + "\n"


def choice(report: AblationReport) -> str:
    """Which variant wins on validation, by how much, and who could not."""
    complete = sorted(
        (v for v in report.variants if v.criterion), key=lambda v: -v.criterion.mean if v.criterion else 0
    )
    if not complete:
        return "None: every variant has a seed that failed."
    best = next(v for v in report.variants if v.name == report.chosen)
    text = f"**{best.name}** with {_cell(best.criterion)}"
    rivals = [v for v in complete if v is not best]
    if rivals:
        text += f", before {rivals[0].name} with {_cell(rivals[0].criterion)}"
    text += f": AP on the validation split, mean over {', '.join(report.chosen_on)}."
    if rivals and best.criterion and rivals[0].criterion:
        spreads = [f.std for f in (best.criterion, rivals[0].criterion) if f.std is not None]
        if not spreads:
            text += " One seed says nothing of how much of the difference is chance."
        elif best.criterion.mean - rivals[0].criterion.mean <= max(spreads):
            text += " The difference is within one standard deviation over seeds: it does not tell them apart."
    left_out = [v.name for v in report.variants if v.failed]
    return text + (f" Not considered, for a seed that failed: {', '.join(left_out)}." if left_out else "")


def _over_table(report: AblationReport, split: str) -> str:
    head = ("variant", "seeds", *(TITLES[metric] for metric in METRICS))
    rows = [(v.name, _seeds(v), *_cells(v, split, OVER_GENERATORS, METRICS)) for v in report.variants]
    return markdown_table(head, rows)


def _generator_table(report: AblationReport, split: str, metric: str) -> str:
    generators = next(tuple(v.figures[split]) for v in report.variants if split in v.figures)
    rows = [(v.name, *(_cells(v, split, generator, (metric,))[0] for generator in generators)) for v in report.variants]
    return markdown_table(("variant", *generators), rows)


def _cells(variant: VariantReport, split: str, generator: str, metrics: Sequence[str]) -> list[str]:
    if split not in variant.figures:
        return ["FAILED"] * len(metrics)
    return [_cell(variant.figures[split][generator][metric]) for metric in metrics]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "n/a"
    return percent(figure.mean) + (f" ± {percent(figure.std)}" if figure.std is not None else "")


def _seeds(variant: VariantReport) -> str:
    finished = len(variant.runs) - variant.failed
    return str(finished) + (f", {variant.failed} FAILED" if variant.failed else "")


def _variant_table(report: AblationReport) -> str:
    rows = []
    for v in report.variants:
        changes = ", ".join(f"{name} = {json.dumps(value)}" for name, value in v.changes.items()) or "nothing"
        pictures = sorted({run.train_pictures for run in v.runs if run.train_pictures is not None})
        traces = [run.traces for run in v.runs if run.traces is not None]
        spread = f"{np.mean([t.hom_std for t in traces]):.4f}" if traces else "n/a"
        rank = f"{np.mean([t.hom_effective_rank for t in traces]):.1f}" if traces else "n/a"
        collapsed = sum(t.collapsed for t in traces)
        rank += f", {collapsed} COLLAPSED" if collapsed else ""
        seconds = f"{np.mean([run.seconds for run in v.runs]):.0f}"
        rows.append(
            (v.name, changes, "n/a" if not pictures else " or ".join(map(str, pictures)), spread, rank, seconds)
        )
    head = ("variant", "changes", "training pictures", "trace std", "trace effective rank", "seconds")
    note = (
        "Trace std and effective rank: of the homogeneous features after stage 1, mean over seeds; COLLAPSED counts "
        "the seeds for which they say about the same of every picture. Seconds: of training, stage 1 included where it "
        "was taken over from a variant with the same one."
    )
    return markdown_table(head, rows) + "\n\n" + note


def _provenance(report: AblationReport) -> str:
    where = report.environment
    commits = sorted({run.commit for v in report.variants for run in v.runs if run.commit})
    lines = [
        f"- data: `{report.data}`",
        f"- tool: {where.get('tool_version')}; commits that trained: {', '.join(commits) or 'unknown'}",
        "- machine: " + ", ".join(f"{k} {v}" for k, v in where.get("machine", {}).items()),
        "- versions: " + ", ".join(f"{k} {v}" for k, v in where.get("versions", {}).items()),
    ]
    for split in report.splits:
        found = [run.splits[split] for v in report.variants for run in v.runs if split in run.splits]
        lines.append(f"- split {split}: {found[0].pictures:,} pictures, SHA-256 `{found[0].data_sha256}`")
    return "\n".join(lines)


def write_ablation(report: AblationReport, folder: Path) -> None:
    """Writes JSON and Markdown, atomically."""
    write_atomically(folder / JSON_FILE, ablation_json(report).encode())
    write_atomically(folder / MARKDOWN_FILE, ablation_markdown(report).encode())
