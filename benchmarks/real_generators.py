"""Compare methods on real generators: `python -m benchmarks.real_generators --recipe edge --data DIR --out DIR`.

`choose` trains every variant of the recipe without one generator at a time and looks at that generator, which is then
an unseen one; nothing sees the test split. `final` trains the baselines, the paper's method and the chosen variant on
all training pictures and evaluates the test split once. Both are studies of `train.ablate`, which go on where they were
stopped. The figures go to `benchmarks/results/generators_<recipe>.json`; docs/results.md is made from these files.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from torch import Tensor

from benchmarks.diagnosis import diagnose
from benchmarks.generators_report import DOCUMENT, RESULTS, write_document
from runtime.errors import NTFError
from train.ablate import run_study
from train.ablation_plan import load_plan
from train.ablation_report import FINAL, REPORTS, VALIDATION, AblationReport, VariantReport
from train.checkpoint import save_json, write_atomically
from train.config import preset_config
from train.data import scan_pictures
from train.errors import ConfigError
from train.pictures import PictureSet
from train.provenance import environment
from train.report import JSON_FILE

RECIPES = Path("benchmarks/recipes")


@dataclass(frozen=True)
class Options:
    """Choose a variant on held-out generators, then compare it with the baselines on the test split."""

    recipe: str
    """Name of a file in benchmarks/recipes, without .json."""
    data: Path
    """Pictures with a train, a val and a test split."""
    out: Path
    """Folder of the studies; those that were stopped go on."""
    step: Literal["choose", "final", "both", "document"] = "both"
    """final needs the choice in the results file; document writes docs/results.md again from all results files."""
    encoder_weights: str = ""
    """Weight file of the recipe's encoder, where the recipe does not name the package's."""
    cache_dir: str = ""
    """Folder of the frozen encoder's embeddings, which all runs share; by default in --out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every variant, in both steps."""


@dataclass(frozen=True)
class Recipe:
    """What is compared.

    Attributes:
        base: changes of the paper preset that all variants share.
        baselines: detectors to compare with.
        paper: the method as in the paper.
        candidates: the method with other options, among which, and `paper`, validation chooses.
        controls: the same networks without parts of the method; the best of them is compared as well.
        hold_out: training generators, each of which is held out once.
        unseen: test generators whose mean is the headline.
        not_in_means: generators that no mean counts, and why.
    """

    base: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    paper: dict[str, dict[str, Any]]
    candidates: dict[str, dict[str, Any]]
    controls: dict[str, dict[str, Any]]
    hold_out: tuple[str, ...]
    unseen: tuple[str, ...]
    not_in_means: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0, or 1 where a run failed, or 2."""
    try:
        options = tyro.cli(Options, prog="python -m benchmarks.real_generators", args=arguments)
        if options.step == "document":
            write_document(DOCUMENT)
            return 0
        recipe = read_recipe(options)
        results = read_results(options.recipe)
        failed = 0
        if options.step in ("choose", "both"):
            results["choice"], failed = choose(recipe, options)
        if options.step in ("final", "both"):
            results["final"], failures = compare(recipe, options, chosen_of(results))
            failed += failures
        results |= {"recipe": options.recipe, "encoder": recipe.base["model"]["encoder"]}
        results |= {"unseen": list(recipe.unseen), "not_in_means": recipe.not_in_means}
        save_json(RESULTS / f"generators_{options.recipe}.json", results)
        write_document(DOCUMENT)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def read_recipe(options: Options) -> Recipe:
    """The recipe, with the paths of this machine in its base.

    Raises:
        ConfigError: no such recipe.
    """
    path = RECIPES / f"{options.recipe}.json"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in RECIPES.glob("*.json")))
        raise ConfigError("--recipe", got=options.recipe, wanted=f"one of {known}", remedy="name one of these")
    values = json.loads(path.read_text(encoding="utf-8"))
    recipe = Recipe(**values | {name: tuple(values[name]) for name in ("hold_out", "unseen")})
    recipe.base["cache"] = recipe.base.get("cache", {}) | {
        "cache_dir": str(Path(options.cache_dir or options.out / "embeddings").absolute())
    }
    if options.encoder_weights:
        recipe.base["model"]["encoder_weights"] = str(Path(options.encoder_weights).absolute())
    return recipe


def read_results(name: str) -> dict[str, Any]:
    """What earlier steps have left."""
    path = RESULTS / f"generators_{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def chosen_of(results: dict[str, Any]) -> tuple[str, str]:
    """The variant of the method that validation chose, and the best control.

    Raises:
        ConfigError: nothing was chosen yet.
    """
    if "choice" not in results:
        raise ConfigError(
            "--step final", got="no choice", wanted="what --step choose leaves", remedy="run --step choose first"
        )
    return results["choice"]["chosen"], results["choice"]["best_control"]


def choose(recipe: Recipe, options: Options) -> tuple[dict[str, Any], int]:
    """AP of every variant on each held-out generator, and the NTF variant with the largest mean."""
    pictures = scan_pictures(options.data)
    variants = recipe.baselines | recipe.paper | recipe.candidates | recipe.controls
    reports, diagnosis = {}, {}
    for generator in recipe.hold_out:
        out = options.out / f"without-{generator}"
        listed = write_hold_out(pictures, generator, out.with_suffix(".csv"))
        reports[generator] = study(recipe, variants, listed, out, options)
        diagnosis[generator] = _diagnosis(reports[generator], listed, out, options.seeds[0])
    found = {name: _held_out_figures(name, reports) for name in variants}
    complete = {name: figures["mean"] for name, figures in found.items() if figures["mean"] is not None}

    def best(names: Iterable[str]) -> str:
        return max((name for name in names if name in complete), key=lambda name: complete[name])

    return {
        "hold_out": list(recipe.hold_out),
        "variants": {name: figures | {"changes": variants[name]} for name, figures in found.items()},
        "best_of_all": best(variants),
        "chosen": best(recipe.paper | recipe.candidates),
        "best_control": best(recipe.controls),
        "diagnosis": diagnosis,
        "seeds": list(options.seeds),
        "environment": environment(),
    }, sum(report.failed for report in reports.values())


def _diagnosis(report: AblationReport, listed: Path, out: Path, seed: int) -> dict[str, Any]:
    """Margins and rows of each variant's first seed on training pictures and on the held-out generator's."""
    pictures = scan_pictures(listed)
    sets = {"trained on": pictures.split("train").records, "held out": pictures.split("val").records}
    known: dict[str, Tensor] = {}
    runs = {v.name: out / "runs" / v.name / f"seed-{seed}" for v in report.variants if not v.failed}
    return {name: diagnose(run, sets, known) for name, run in runs.items()}


def _held_out_figures(name: str, reports: dict[str, AblationReport]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for generator, report in reports.items():
        variant = _variant(report, name)
        figure = None if variant.failed else variant.figures[VALIDATION][generator]["ap"]
        figures[generator] = None if figure is None else {"mean": figure.mean, "std": figure.std}
        figures.setdefault("failures", []).extend(run.failure for run in variant.runs if run.failure)
    means = [figures[generator] for generator in reports]
    whole = all(mean is not None for mean in means)
    return figures | {"mean": float(np.mean([mean["mean"] for mean in means])) if whole else None}


def compare(recipe: Recipe, options: Options, chosen: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Figures of the baselines, the paper's method and the chosen variants on the test split."""
    known = recipe.paper | recipe.candidates | recipe.controls
    variants = recipe.baselines | recipe.paper | {name: known[name] for name in chosen}
    out = options.out / "final"
    report = study(recipe, variants, options.data, out, options, final=True)
    first = {variant.name: _evaluation(out, variant.name, options.seeds[0]) for variant in report.variants}
    some = next(value for value in first.values() if value is not None)
    return {
        "variants": {variant.name: _final_figures(variant, first[variant.name]) for variant in report.variants},
        "trivial_auc": some["trivial_auc"],
        "pictures": {
            entry["name"]: [entry["metrics"]["real"], entry["metrics"]["fake"]] for entry in some["generators"]
        },
        "data_sha256": some["data_sha256"],
        "seeds": list(options.seeds),
        "environment": environment(),
    }, report.failed


def _final_figures(variant: VariantReport, first: dict[str, Any] | None) -> dict[str, Any]:
    figures = variant.figures.get(FINAL, {})
    return {
        "generators": {
            name: {metric: None if f is None else {"mean": f.mean, "std": f.std} for metric, f in metrics.items()}
            for name, metrics in figures.items()
        },
        "by_seed": {
            str(run.seed): {name: values["ap"] for name, values in run.splits[FINAL].generators.items()}
            for run in variant.runs
            if FINAL in run.splits
        },
        "ap_interval_of_first_seed": {
            entry["name"]: entry["intervals"].get("ap") for entry in (first or {"generators": []})["generators"]
        },
        "validation_ap": None
        if variant.criterion is None
        else {"mean": variant.criterion.mean, "std": variant.criterion.std},
        "seconds": [round(run.seconds, 1) for run in variant.runs],
        "failures": [run.failure for run in variant.runs if run.failure],
        "changes": variant.changes,
    }


def study(
    recipe: Recipe, variants: dict[str, dict[str, Any]], data: Path, out: Path, options: Options, *, final: bool = False
) -> AblationReport:
    """One study of `train.ablate`.

    Raises:
        NTFError: the recipe cannot be carried out.
    """
    plan = out.with_name(f"{out.name}.plan.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(plan, json.dumps({"base": recipe.base, "variants": variants}, indent=1).encode())
    loaded = load_plan(str(plan), preset_config("paper"), data=str(data))
    return run_study(loaded, options.seeds, out, final=final, keep_weights=not final)


def write_hold_out(pictures: PictureSet, generator: str, path: Path) -> Path:
    """A list in which this generator's training and validation pictures are the validation split, all others train.

    Fakes that were made from an original of these pictures, as `train.resynthesize` makes them, are in neither split.

    Raises:
        ConfigError: there is no such generator.
    """
    known = sorted({record.generator for record in pictures.records})
    if generator not in known:
        raise ConfigError("hold_out", got=generator, wanted=f"one of {', '.join(known)}", remedy="correct the recipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    originals = {record.original_id for record in pictures.records if record.generator == generator}
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "generator", "family", "original_id", "split"))
        for record in pictures.records:
            held_out = record.generator == generator
            made_from_it = record.label == 1 and record.original_id in originals
            if record.split == "test" or (not held_out and (record.split == "val" or made_from_it)):
                continue
            split = "val" if held_out else "train"
            rows.writerow((record.path, record.label, record.generator, record.family, record.original_id, split))
    return path


def _variant(report: AblationReport, name: str) -> VariantReport:
    return next(variant for variant in report.variants if variant.name == name)


def _evaluation(out: Path, variant: str, seed: int) -> dict[str, Any] | None:
    path = out / "runs" / variant / f"seed-{seed}" / REPORTS / FINAL / JSON_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
