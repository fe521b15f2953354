"""docs/results.md: what `benchmarks.real_generators` found, from its JSON files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generators_ideas import UNMEASURED, ideas_section
from train.checkpoint import write_atomically
from train.markdown import markdown_table, percent

RESULTS = Path("benchmarks/results")
DOCUMENT = Path("docs/results.md")
TUNED = "tuned"
NAMES = {
    "edge": "Edge encoder",
    "edge_resynthesis": "Edge encoder, with rebuilt photographs",
    "server": "Server encoder",
    "server_resynthesis": "Server encoder, with rebuilt photographs",
}
PLAIN = {"edge_resynthesis": "edge", "server_resynthesis": "server"}  # the same without the rebuilt photographs
REBUILT = """The same training pictures, and as more fakes every real one of them as a small network rebuilds it:
`python -m train.resynthesize` with its defaults, one network with transposed convolutions that learnt from these
photographs alone. Where a generator is held out, what was rebuilt from its photographs is left out as well. Validation
and test pictures are those above."""
BASELINES = ("probe", "nearest", "bce")
STANDINGS = """The method: the variant that the held-out generators chose. n/a: not trained. The presets `edge` and
`server` are what is best on the held-out generators of the first section of their encoder, of the method or not."""
INTRODUCTION = """# Methods on real generators

Made by `python -m benchmarks.real_generators` from `benchmarks/results/generators_*.json`; benchmarks/README.md says
how to repeat it. All figures in percent. Pictures: 224 px crops of photographs and of what real generators made, one
JPEG quality for all; training has Stable Diffusion 1.x, StyleGAN faces and CycleGAN, testing others as well. The
pictures are not in this repository.

**How a variant is chosen.** Each is trained without one generator at a time and scores that generator's pictures, which
are then those of an unseen one; the tables say with which seeds. The chosen one has the largest mean AP over them.
Variants without the natural traces (eta = 0), without the contrastive loss (no-scl) or without the heads are controls:
what they reach is not the method's. The test split is evaluated once, for the baselines, the paper's method, the chosen
variant and the best control."""


def write_document(path: Path) -> None:
    """Write the document from all results that are there."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("generators_*.json"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (document(found) + "\n").encode())


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """The whole document as Markdown."""
    sections = [INTRODUCTION, "## Which is ahead", *_standings(results)]
    known = {found["recipe"]: found for found in results}
    for found in results:
        sections.append(f"## {NAMES.get(found['recipe'], found['recipe'])}: `{found['encoder']}`")
        if found["recipe"] in PLAIN:
            sections += [REBUILT, *_with_and_without(found, known.get(PLAIN[found["recipe"]]))]
        if "final" in found:
            sections += ["### Test", _final(found)]
        if "choice" in found:
            sections += ["### Choice on held-out generators", _choice(found["choice"], found["recipe"])]
    return "\n\n".join([*sections, UNMEASURED])


def _standings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The chosen variant beside each baseline and the best control, on held-out and on unseen test generators."""
    rows = []
    for found in results:
        if "choice" not in found:
            continue
        choice = found["choice"]
        for place, figure in (("held out", _held_out_mean), ("unseen test", _unseen_mean)):
            cells = [figure(found, name) or "n/a" for name in (choice["chosen"], *BASELINES, choice["best_control"])]
            if cells[0] != "n/a":
                rows.append((f"{NAMES.get(found['recipe'], found['recipe'])}, {place}", *cells))
    head = ("mean AP", "the method", *BASELINES, "best control")
    return [markdown_table(head, rows), STANDINGS]


def _with_and_without(found: Mapping[str, Any], plain: Mapping[str, Any] | None) -> list[str]:
    """What the rebuilt photographs change for each variant of both studies: one table, or nothing to compare with."""
    if plain is None:
        return []
    studies = (plain, found)
    names = {name for f in studies for part in ("choice", "final") if part in f for name in f[part]["variants"]}
    rows = []
    for name in sorted(names):
        cells = [*(_held_out_mean(f, name) for f in studies), *(_unseen_mean(f, name) for f in studies)]
        if all(cells[:2]) or all(cells[2:]):
            rows.append((name, *cells))
    head = ("mean AP", "held out, without", "held out, with", "unseen test, without", "unseen test, with")
    return [markdown_table(head, rows)] if rows else []


def _held_out_mean(found: Mapping[str, Any], name: str) -> str:
    variant = found.get("choice", {}).get("variants", {}).get(name)
    return "" if variant is None else percent(variant["mean"])


def _unseen_mean(found: Mapping[str, Any], name: str) -> str:
    variant = found.get("final", {}).get("variants", {}).get(name)
    return "" if variant is None or not variant["by_seed"] else _mean(variant, found["unseen"])


def _choice(choice: Mapping[str, Any], recipe: str) -> str:
    held_out = choice["hold_out"]
    rows, common = [], _common(choice["variants"].values())
    for name, figures in sorted(choice["variants"].items(), key=lambda item: -(item[1]["mean"] or 0)):
        cells = [_figure(figures[generator]) for generator in held_out]
        rows.append((name, _changes(figures["changes"], common), *cells, percent(figures["mean"])))
    table = markdown_table(("variant", "options", *(f"{name} held out" for name in held_out), "mean AP"), rows)
    table += f"\n\n{TUNED}: {', '.join(f'{name} = {json.dumps(value)}' for name, value in common.items())}."
    text = (
        f"Seeds: {', '.join(map(str, choice['seeds']))}. "
        f"Chosen for the test: **{choice['chosen']}**, the best variant of the method; and "
        f"**{choice['best_control']}**, the best of those without a part of it."
    )
    if choice["best_of_all"] != choice["chosen"]:
        text += f" Among all that were tried, **{choice['best_of_all']}** is best on the held-out generators."
    failures = [f"- {n}: {sentence}" for n, v in choice["variants"].items() for sentence in v.get("failures", [])]
    parts = [table, text, *(["Failed:\n\n" + "\n".join(failures)] if failures else [])]
    tried = ideas_section(recipe, choice)
    parts += ["#### What else was tried", tried] if tried else []
    if "diagnosis" in choice:
        parts += ["#### What the terms do", _diagnosis(choice["diagnosis"])]
    return "\n\n".join([*parts, _where(choice)])


def _diagnosis(diagnosis: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """Margins and rows by variant and set, of the first seed."""
    head = (
        "variant",
        "pictures",
        "margin",
        "alignment real",
        "alignment fake",
        "uniformity",
        "similarity real",
        "similarity fake",
        "trace rank",
    )
    keys = (
        "margin",
        "alignment_real",
        "alignment_fake",
        "uniformity",
        "similarity_real",
        "similarity_fake",
        "trace_rank",
    )
    rows = [
        (f"{variant}, without {generator}", name, *(f"{f[key]:.2f}" if key in f else "n/a" for key in keys))
        for generator, variants in diagnosis.items()
        for variant, sets in variants.items()
        for name, f in sets.items()
    ]
    note = (
        "Margin: between the classes' mean logits, in standard deviations within a class. Alignment: mean squared "
        "distance of two rows z of one class, 0 where all are alike; uniformity: lower is more even on the sphere "
        "(Wang and Isola 2020). Similarity: cosine of z with the mean natural trace. First seed."
    )
    return markdown_table(head, rows) + "\n\n" + note


def _final(found: Mapping[str, Any]) -> str:
    final, unseen = found["final"], found["unseen"]
    generators = sorted(final["pictures"], key=lambda name: (name not in unseen, name in found["not_in_means"], name))
    counted = [name for name in generators if name not in found["not_in_means"]]
    rows: list[tuple[str, ...]] = []
    for name, variant in final["variants"].items():
        if not variant["generators"]:
            rows.append((name, *["FAILED"] * (len(generators) + 2)))
            continue
        cells = [_figure(variant["generators"][generator]["ap"]) for generator in generators]
        rows.append((name, *cells, _mean(variant, unseen), _mean(variant, counted)))
    rows.append(("trivial features, AUC", *(percent(final["trivial_auc"].get(g)) for g in generators), "", ""))
    titles = [
        f"{g}{'†' if g in found['not_in_means'] else ''} ({'/'.join(map(str, final['pictures'][g]))})"
        for g in generators
    ]
    table = markdown_table(("AP", *titles, "mean of the unseen", "mAP"), rows)
    notes = "; ".join(f"{name}: {why}" for name, why in found["not_in_means"].items())
    text = (
        f"Real/fake pictures in brackets. Unseen generators: {', '.join(unseen)}. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, final['seeds']))}. † not counted in means ({notes}). Trivial features: AUC of file "
        "length, size and format alone, `python -m train.audit`."
    )
    chosen = found.get("choice", {}).get("chosen")
    if chosen is not None and chosen not in final["variants"]:
        text += f" **{chosen}**, which was chosen since, is not in the table: `--step final` evaluates it."
    return "\n\n".join([table, text, _decisions(final, counted), _intervals(final, generators), _where(final)])


def _mean(variant: Mapping[str, Any], generators: Sequence[str]) -> str:
    """Mean over generators of each seed, then over seeds."""
    means = [float(np.mean([values[name] for name in generators])) for values in variant["by_seed"].values()]
    return _figure({"mean": float(np.mean(means)), "std": float(np.std(means, ddof=1)) if len(means) > 1 else None})


def _decisions(final: Mapping[str, Any], counted: Sequence[str]) -> str:
    """Errors at the validation threshold, mean over generators."""
    metrics = {"real_flagged_rate": "real flagged", "fake_missed_rate": "fake missed", "accuracy_at_threshold": "ACC"}
    rows = []
    for name, variant in final["variants"].items():
        if variant["generators"]:
            cells = [
                percent(float(np.mean([variant["generators"][g][metric]["mean"] for g in counted])))
                for metric in metrics
            ]
            worst = max(variant["generators"][g]["real_flagged_rate"]["mean"] for g in counted)
            seconds = f"{np.mean(variant['seconds']):.0f}"
            rows.append((name, *cells, percent(worst), _figure(variant["validation_ap"]), seconds))
    head = (
        "at the validation threshold",
        *metrics.values(),
        "real flagged, worst",
        "validation AP",
        "seconds to train",
    )
    return markdown_table(head, rows)


def _intervals(final: Mapping[str, Any], generators: Sequence[str]) -> str:
    rows = []
    for name, variant in final["variants"].items():
        found = variant["ap_interval_of_first_seed"]
        cells = []
        for generator in generators:
            interval = found.get(generator)
            cells.append("n/a" if interval is None else f"{percent(interval['low'])} to {percent(interval['high'])}")
        rows.append((name, *cells))
    head = (f"AP of seed {final['seeds'][0]}, 95 % by originals", *generators)
    return markdown_table(head, rows)


def _changes(changes: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """Options of a variant; those that most have stand as one word."""
    own = _flat(changes)
    tuned = bool(common) and common.items() <= own.items()
    shown = {name: value for name, value in own.items() if not (tuned and name in common)}
    words = [TUNED] if tuned else []
    return ", ".join(words + [f"{name} = {json.dumps(value)}" for name, value in shown.items()]) or "the recipe's base"


def _common(variants: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What at least half of the variants have in common."""
    found = [_flat(variant["changes"]) for variant in variants]
    counts = Counter((name, json.dumps(value)) for changes in found for name, value in changes.items())
    return {name: json.loads(value) for (name, value), count in sorted(counts.items()) if 2 * count >= len(found) > 3}


def _flat(changes: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(changes, "")
    return flat


def _figure(figure: Mapping[str, float | None] | None) -> str:
    if figure is None:
        return "n/a"
    text = percent(figure["mean"])
    return text if figure.get("std") is None else f"{text} ± {percent(figure['std'])}"


def _where(part: Mapping[str, Any]) -> str:
    where = part["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    machine = where["machine"]
    return f"Made on {machine['cpu']}, {machine['cores']} cores, commit {where['tool_commit']}, {versions}."
