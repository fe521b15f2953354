"""What a study found: figures of every run, mean and standard deviation over seeds, and the choice on validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.ablation_plan import Plan, changes_of
from train.bootstrap import METRICS
from train.checkpoint import CONFIG_FILE, HISTORY_FILE
from train.errors import CheckpointError
from train.report import JSON_FILE as EVALUATION_FILE
from train.report import EvaluationReport, report_from_jsonable
from train.shared_traces import SOURCE_KEY
from train.stages import COLLAPSE_RANK, COLLAPSE_STD_SHARE

REPORTS = "report"
VALIDATION, FINAL = "val", "test"
OVER_GENERATORS = "mean over generators"


@dataclass(frozen=True)
class Traces:
    """Spread of the homogeneous features after stage 1; collapsed ones say the same of every picture."""

    hom_std: float
    hom_effective_rank: float
    collapsed: bool


@dataclass(frozen=True)
class SplitFigures:
    """One run on one split: metrics by generator, and their unweighted means over those with both classes; shares."""

    data_sha256: str
    pictures: int
    generators: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class RunReport:
    """One variant with one seed.

    Attributes:
        seed: of the run.
        failure: the sentence with which it failed; None where it was finished.
        train_pictures: that it was trained on; None where it failed before that was known.
        train_sha256: hash of these.
        stage1_from: run folder that stage 1 was taken from, or None where it was trained.
        seconds: of training; stage 1 counts also where it was taken over.
        traces: of stage 1; None without natural traces, or where it failed before.
        commit: of the toolkit that trained it.
        splits: figures by split.
    """

    seed: int
    failure: str | None
    train_pictures: int | None
    train_sha256: str | None
    stage1_from: str | None
    seconds: float
    traces: Traces | None
    commit: str | None
    splits: dict[str, SplitFigures]


@dataclass(frozen=True)
class Figure:
    """A metric over seeds: mean and sample standard deviation, None of a single seed."""

    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class VariantReport:
    """All seeds of a variant.

    Attributes:
        name: of the variant.
        changes: options in which it differs from the study's base.
        runs: one for each seed.
        figures: by split, generator (or `OVER_GENERATORS`) and metric, over the finished seeds; None where undefined.
        criterion: AP on validation, mean over the generators that decide, over seeds; None where a seed failed.
    """

    name: str
    changes: dict[str, Any]
    runs: tuple[RunReport, ...]
    figures: dict[str, dict[str, dict[str, Figure | None]]]
    criterion: Figure | None

    @property
    def failed(self) -> int:
        """Seeds that failed."""
        return sum(run.failure is not None for run in self.runs)


@dataclass(frozen=True)
class AblationReport:
    """A whole study.

    Attributes:
        study: its name.
        data: the collection.
        seeds: of every variant.
        chosen_on: generators of the validation split that decide.
        chosen: variant with the largest criterion, the first of equal ones; None where every variant has a failed seed.
        base: configuration that the variants change.
        variants: in the plan's order.
        environment: tool, machine and versions that wrote this report.
    """

    study: str
    data: str
    seeds: tuple[int, ...]
    chosen_on: tuple[str, ...]
    chosen: str | None
    base: dict[str, Any]
    variants: tuple[VariantReport, ...]
    environment: dict[str, Any]

    @property
    def failed(self) -> int:
        """Runs that failed."""
        return sum(variant.failed for variant in self.variants)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that any run was evaluated on."""
        found = {split for variant in self.variants for split in variant.figures}
        return tuple(split for split in (VALIDATION, FINAL) if split in found)


def run_report(folder: Path, seed: int, failure: str | None, embedding_dim: int) -> RunReport:
    """What a run left in its folder.

    Args:
        folder: of the run, finished or failed.
        seed: of the run.
        failure: its sentence, or None.
        embedding_dim: C, from which the floor of the traces' spread follows.

    Raises:
        NTFError: an evaluation of it cannot be read.
    """
    path = folder / CONFIG_FILE
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    history = folder / HISTORY_FILE
    lines = [json.loads(line) for line in history.read_text("utf-8").splitlines()] if history.is_file() else []
    splits = {}
    for split in (VALIDATION, FINAL) if failure is None else ():
        evaluation = folder / REPORTS / split / EVALUATION_FILE
        if evaluation.is_file():
            values = json.loads(evaluation.read_text(encoding="utf-8"))
            splits[split] = split_figures(report_from_jsonable(values, subject=str(evaluation)))
    return RunReport(
        seed=seed,
        failure=failure,
        train_pictures=recorded.get("data", {}).get("train_pictures"),
        train_sha256=recorded.get("data", {}).get("train_sha256"),
        stage1_from=recorded.get(SOURCE_KEY, {}).get("run"),
        seconds=sum(line["seconds"] for line in lines),
        traces=_traces(lines, embedding_dim),
        commit=recorded.get("environment", {}).get("tool_commit"),
        splits=splits,
    )


def split_figures(report: EvaluationReport) -> SplitFigures:
    """The part of an evaluation that a study compares."""
    return SplitFigures(
        data_sha256=report.data_sha256,
        pictures=report.pictures,
        generators={
            entry.name: {metric: getattr(entry.metrics, metric) for metric in METRICS}
            for entry in sorted(report.generators, key=_by_name)
        },
    )


def _by_name(entry: Any) -> str:
    return str(entry.name)


def ablation_report(
    plan: Plan, runs: Mapping[str, Sequence[RunReport]], chosen_on: Sequence[str], environment: dict[str, Any]
) -> AblationReport:
    """The report of a study.

    Args:
        plan: of the study.
        runs: of each variant, one for each seed.
        chosen_on: generators of the validation split that decide.
        environment: tool, machine and versions.

    Raises:
        CheckpointError: runs were evaluated on different pictures.
    """
    _refuse_different_pictures(plan, runs)
    variants = tuple(_variant_report(name, plan, runs[name], chosen_on) for name in plan.variants)
    complete = [variant for variant in variants if variant.criterion is not None]
    best = max(complete, key=lambda v: v.criterion.mean if v.criterion else math.nan, default=None)
    return AblationReport(
        study=plan.study,
        data=plan.base.data,
        seeds=tuple(run.seed for run in runs[variants[0].name]),
        chosen_on=tuple(chosen_on),
        chosen=best.name if best else None,
        base=json.loads(json.dumps(asdict(plan.base))),
        variants=variants,
        environment=environment,
    )


def _variant_report(name: str, plan: Plan, runs: Sequence[RunReport], chosen_on: Sequence[str]) -> VariantReport:
    finished = [run for run in runs if run.failure is None]
    figures: dict[str, dict[str, dict[str, Figure | None]]] = {}
    for split in (VALIDATION, FINAL):
        found = [run.splits[split] for run in finished if split in run.splits]
        if found:
            over = {m: _over_seeds([_over_generators(f, m, f.generators) for f in found]) for m in METRICS}
            figures[split] = {OVER_GENERATORS: over} | {
                generator: {m: _over_seeds([f.generators[generator][m] for f in found]) for m in METRICS}
                for generator in found[0].generators
            }
    complete = len(finished) == len(runs)
    criterion = [_over_generators(run.splits[VALIDATION], "ap", chosen_on) for run in finished] if complete else []
    changes = changes_of(plan.base, plan.variants[name])
    return VariantReport(name, changes, tuple(runs), figures, _over_seeds(criterion))


def _over_generators(figures: SplitFigures, metric: str, names: Iterable[str]) -> float | None:
    """Unweighted mean over the named generators, those with both classes alone, so that all metrics are of the same."""
    chosen = [figures.generators[name] for name in names]
    values = [float(f[metric] or 0.0) for f in chosen if f["ap"] is not None]
    return float(np.mean(values)) if values else None


def _over_seeds(values: Sequence[float | None]) -> Figure | None:
    defined = [value for value in values if value is not None]
    if not defined or len(defined) < len(values):
        return None
    std = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return Figure(float(np.mean(defined)), std, len(defined))


def _traces(lines: Sequence[dict[str, Any]], embedding_dim: int) -> Traces | None:
    last = next((line for line in reversed(lines) if line["stage"] == 1 and "hom_std" in line), None)
    if last is None:
        return None
    std, rank = last["hom_std"], last["hom_effective_rank"]
    return Traces(std, rank, std < COLLAPSE_STD_SHARE / math.sqrt(embedding_dim) or rank < COLLAPSE_RANK)


def _refuse_different_pictures(plan: Plan, runs: Mapping[str, Sequence[RunReport]]) -> None:
    """Runs of one study are of the same pictures, trained and evaluated, but for what their configurations select."""
    hashes: dict[str, set[str]] = {}
    for name, found in runs.items():
        config = plan.variants[name]
        for run in found:
            seed = run.seed if config.train_share < 1 else "any"
            selection = f"training pictures ({config.train_generators or 'all'}, {config.train_share:g}, seed {seed})"
            if run.train_sha256 is not None:
                hashes.setdefault(selection, set()).add(run.train_sha256)
            for split, figures in run.splits.items():
                hashes.setdefault(f"split {split!r}", set()).add(figures.data_sha256)
    for what, digests in hashes.items():
        if len(digests) > 1:
            raise CheckpointError(
                f"{what} of the study",
                got=f"runs with different ones ({', '.join(digest[:12] for digest in sorted(digests))})",
                wanted="the same for all of them",
                remedy="restore the pictures, and begin again in another --out",
            )
