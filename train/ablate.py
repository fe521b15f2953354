"""Compare variants of training over seeds: `python -m train.ablate --study architecture --data DIR`.

Every run goes through `train.run.train` and `train.evaluate.evaluate_run`. A study that was stopped goes on where it
stood when it is started again; a run that fails is recorded with its sentence, and the others follow.

Stage 1 is trained once for variants that differ in stage 2 alone: the run that trained it keeps its weights until the
last of them has taken them over (`train.shared_traces`), which gives the same weights as training it again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from runtime.errors import NTFError
from train.ablation_figure import write_ablation_figure
from train.ablation_plan import (
    PLAN_FILE,
    Plan,
    check_plan,
    generators_with_both_classes,
    load_plan,
    settle_plan,
)
from train.ablation_report import FINAL, REPORTS, VALIDATION, AblationReport, ablation_report, run_report
from train.ablation_tables import FIGURE_FILE, JSON_FILE, MARKDOWN_FILE, choice, write_ablation
from train.checkpoint import CONFIG_FILE, STAGE1_FILE, STAGE2_FILE, STATE_FILE, save_json
from train.compute import choose_device
from train.config import Preset, RunConfig, config_from_file, preset_config
from train.data import load_split
from train.errors import CheckpointError, ConfigError
from train.evaluate import evaluate_run
from train.evaluation_config import EvaluationConfig
from train.integrity import data_source
from train.methods import METHODS
from train.provenance import environment
from train.ranks import ALONE
from train.report import JSON_FILE as EVALUATION_FILE
from train.run import check_start, train
from train.shared_traces import trace_options

OUTCOME_FILE = "outcome.json"
RUNS = "runs"


@dataclass(frozen=True)
class Options:
    """Train and compare variants; the tables have mean and standard deviation over seeds."""

    study: str
    """architecture (parts of the method left out), options (each named option by itself), data (other and fewer
    training pictures), or a JSON file: {"base": {...}, "variants": {"name": {...}}, "chosen_on": ["generator"]}."""
    out: Path
    """Folder of the study; one that was stopped goes on."""
    data: str = ""
    """Collection of pictures, as for train.run; by default the preset's or the configuration's."""
    preset: Preset = "demo"
    """Configuration that the variants change."""
    config: Path | None = None
    """The same from a run's config.json, instead of a preset."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every variant."""
    final: bool = False
    """Evaluate the test pictures as well, once all runs have ended; without it nothing looks at them. Runs whose
    weights were not kept are trained again."""
    keep_weights: bool = False
    """Keep the weights of every run; by default reports, histories and configurations alone."""
    retry_failed: bool = False
    """Train runs again that failed in an earlier start."""
    draws: int = 1000
    """Bootstrap resamplings of each evaluation."""


@dataclass(frozen=True)
class Job:
    """One variant with one seed.

    Attributes:
        variant: its name.
        config: of the run, with its seed.
        folder: of the run.
    """

    variant: str
    config: RunConfig
    folder: Path

    @property
    def outcome(self) -> dict[str, str] | None:
        """How it ended: {"status": "finished"} or {"status": "failed", "sentence": ...}; None before that."""
        path = self.folder / OUTCOME_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def failure(self) -> str | None:
        """The sentence with which it failed."""
        return (self.outcome or {}).get("sentence")

    def evaluated(self, split: str) -> bool:
        """Whether there is a report on a split."""
        return (self.folder / REPORTS / split / EVALUATION_FILE).is_file()

    def shares_stage1_with(self, other: Job) -> bool:
        """Whether both have the same stage 1, as far as their configurations say; training checks the rest."""
        return _stage1_of(self.config) is not None and _stage1_of(self.config) == _stage1_of(other.config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0 all runs finished, 1 some failed, 2 an error, 130 stopped."""
    try:
        options = tyro.cli(Options, prog="python -m train.ablate", args=arguments)
        base = preset_config(options.preset) if options.config is None else config_from_file(options.config)
        plan = load_plan(options.study, base, data=options.data)
        report = run_study(
            plan,
            options.seeds,
            options.out,
            final=options.final,
            keep_weights=options.keep_weights,
            retry_failed=options.retry_failed,
            draws=options.draws,
        )
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}: correct it and start the same command again, which goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print("wrote " + ", ".join(str(options.out / name) for name in (JSON_FILE, MARKDOWN_FILE, FIGURE_FILE)))
    print(choice(report))
    for variant in report.variants:
        for run in variant.runs:
            if run.failure is not None:
                print(f"FAILED: {variant.name}, seed {run.seed}: {run.failure}", file=sys.stderr)
    return 1 if report.failed else 0


def run_study(
    plan: Plan,
    seeds: Sequence[int],
    out: Path,
    *,
    final: bool = False,
    keep_weights: bool = False,
    retry_failed: bool = False,
    draws: int = 1000,
) -> AblationReport:
    """Trains and evaluates what is missing, and writes the report.

    Args:
        plan: the variants.
        seeds: of every variant; further ones may be added later.
        out: folder of the study.
        final: evaluate the test pictures once all runs have ended.
        keep_weights: keep the weights of every run.
        retry_failed: train failed runs of an earlier start again.
        draws: bootstrap resamplings of each evaluation.

    Raises:
        NTFError: the plan cannot be carried out, or has changed since the study began. What fails in a run alone is
            recorded, and the study goes on.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            "--seeds", got=" ".join(map(str, seeds)), wanted="different numbers from 0 up", remedy="change it"
        )
    check_plan(plan)
    for config in plan.variants.values():
        check_start(config, choose_device(config.device), ALONE, resume=False)
    settled = settle_plan(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / PLAN_FILE, settled)
    jobs = [
        Job(name, dataclasses.replace(config, seed=seed), out / RUNS / name / f"seed-{seed}")
        for seed in seeds
        for name, config in plan.variants.items()
    ]
    for job in jobs:
        _begin_again(job, final=final, retry_failed=retry_failed)
    evaluations = _Evaluations(draws)
    for number, job in enumerate(jobs, 1):
        if job.outcome is None:
            print(f"\n== {job.variant}, seed {job.config.seed} ({number} of {len(jobs)})", flush=True)
            _carry_out(job, jobs, evaluations)
        _drop_weights(jobs, keep=keep_weights, final=final)
    if final:
        for job in jobs:
            if job.failure is None and not job.evaluated(FINAL):
                evaluations.evaluate(job, FINAL)
        _drop_weights(jobs, keep=keep_weights, final=final)
    return _write(plan, jobs, out)


def _begin_again(job: Job, *, final: bool, retry_failed: bool) -> None:
    """Remove a run that is to be trained again: a failed one, or one that has no weights left to be evaluated."""
    if job.failure is not None:
        again = retry_failed
    else:
        again = job.outcome is not None and final and not (job.evaluated(FINAL) or (job.folder / STAGE2_FILE).is_file())
    # A run that was stopped before it had a configuration has nothing to go on with.
    if again or (job.folder.is_dir() and not (job.folder / CONFIG_FILE).is_file() and job.outcome is None):
        shutil.rmtree(job.folder)


def _carry_out(job: Job, jobs: Sequence[Job], evaluations: _Evaluations) -> None:
    """Train and validate a run, and record how it ended."""
    sharing = (other for other in jobs if other is not job and job.shares_stage1_with(other))
    source = next((other.folder for other in sharing if (other.folder / STAGE1_FILE).is_file()), None)
    resume = (job.folder / CONFIG_FILE).is_file()
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        train(job.config, job.folder, resume=resume, stage1_from=source)
        evaluations.evaluate(job, VALIDATION)
    except CheckpointError:
        raise  # a full disk, or files that were changed: no other run would fare better
    except (NTFError, torch.OutOfMemoryError) as error:
        print(f"FAILED: {error}", file=sys.stderr, flush=True)
        save_json(job.folder / OUTCOME_FILE, {"status": "failed", "sentence": str(error)})
    else:
        save_json(job.folder / OUTCOME_FILE, {"status": "finished"})


class _Evaluations:
    """Evaluates runs; what trivial features reach is of the pictures alone and is found once.

    Args:
        draws: bootstrap resamplings.
    """

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self._trivial: dict[str, dict[str, float | None]] = {}

    def evaluate(self, job: Job, split: str) -> None:
        """Score a split with a run, and leave the report in its folder."""
        config = job.config
        pictures = json.dumps([split, config.corrupt, dataclasses.asdict(config.equalize)])
        report = evaluate_run(
            job.folder,
            data_source(config.data),
            EvaluationConfig(
                split=split,
                corrupt=config.corrupt,
                equalize=config.equalize,
                cache_dir=Path(config.cache.cache_dir) if config.cache.cache_dir else None,
                workers=config.workers,
                draws=self.draws,
            ),
            out=job.folder / REPORTS / split,
            trivial_auc=self._trivial.get(pictures),
            progress=False,
        )
        self._trivial[pictures] = report.trivial_auc


def _drop_weights(jobs: Sequence[Job], *, keep: bool, final: bool) -> None:
    """Remove what ended runs need no more: stage 1 once nobody is to take it over, the rest once it is evaluated."""
    waiting = [job for job in jobs if job.outcome is None]
    for job in jobs:
        if job.outcome is None:
            continue
        dropped = [STATE_FILE]
        if not keep and not any(job.shares_stage1_with(other) for other in waiting):
            dropped.append(STAGE1_FILE)
        if not keep and (job.failure is not None or not final or job.evaluated(FINAL)):
            dropped.append(STAGE2_FILE)
        for name in dropped:
            (job.folder / name).unlink(missing_ok=True)
        shutil.rmtree(job.folder / "cache", ignore_errors=True)


def _stage1_of(config: RunConfig) -> str | None:
    if not METHODS[config.method].natural_traces:
        return None
    pictures = (config.data, config.corrupt, config.train_generators, config.train_share)
    return json.dumps([trace_options(config), *pictures, config.model.encoder_weights])


def _write(plan: Plan, jobs: Sequence[Job], out: Path) -> AblationReport:
    validation = load_split(data_source(plan.base.data), "val")
    chosen_on = plan.chosen_on or sorted(generators_with_both_classes(validation))
    runs = {
        name: [
            run_report(job.folder, job.config.seed, job.failure, job.config.model.embedding_dim)
            for job in jobs
            if job.variant == name
        ]
        for name in plan.variants
    }
    report = ablation_report(plan, runs, chosen_on, environment())
    write_ablation(report, out)
    write_ablation_figure(report, out / FIGURE_FILE)
    return report


if __name__ == "__main__":
    sys.exit(main())
