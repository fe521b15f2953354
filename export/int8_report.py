"""How an INT8 graph was found: JSON and Markdown in the report folder of the run, and what it cost on the screen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from export.budget import Budget
from export.int8 import Int8Search, LayerSensitivity, Step
from export.verification import jsonable
from train.checkpoint import write_atomically
from train.markdown import markdown_table
from train.provenance import environment

FOLDER = Path("report") / "int8"
JSON_FILE, MARKDOWN_FILE = "int8.json", "int8.md"

STEP_COLUMNS = ("layers returned", "operations in INT8", "MB", "back-end", "AP", "accuracy", "flips", "ECE", "fits")
LAYER_COLUMNS = ("layer", "SQNR dB", "change of the logits (std)", "share of operations", "stays in")


def write_search(run: Path, search: Int8Search, budget: Budget, console: Console) -> None:
    """Write both files into a run's report folder and say where they are.

    Args:
        run: folder of the run.
        search: what was tried.
        budget: what was allowed.
        console: told where.
    """
    folder = run / FOLDER
    content = {
        "budget": dataclasses.asdict(budget),
        **dataclasses.asdict(search),
        "environment": environment(),
    }
    text = json.dumps(jsonable(content), indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JSON_FILE, text.encode())
        write_atomically(folder / MARKDOWN_FILE, search_markdown(search, budget).encode())
    except OSError as error:
        console.print(f"note: how INT8 was found could not be written to {folder}: {error.strerror}")
        return
    if search.returned:
        console.print(f"{len(search.returned)} layers stay in floating point; what that cost: {folder / MARKDOWN_FILE}")


def search_markdown(search: Int8Search, budget: Budget) -> str:
    """The search as tables."""
    allowed = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(budget).items())
    lines = [
        "# INT8 within the accuracy budget",
        "",
        f"Budget in percentage points against PyTorch: {allowed}; one picture is always allowed. Losses are positive;",
        "AP is that of the generator that loses most.",
        "",
        markdown_table(STEP_COLUMNS, [row for step in search.steps for row in _step_rows(step)]),
        "",
        f"Ranges by {search.calibrator}. Standard deviation of the logits' change, by calibrator: "
        + ", ".join(f"{name} {value:.4f}" for name, value in search.calibrators.items())
        + ".",
    ]
    if search.sensitivities:
        rows = [_layer_row(layer, search) for layer in search.sensitivities]
        lines += ["", "Each layer in INT8 alone, the most sensitive first:", "", markdown_table(LAYER_COLUMNS, rows)]
    return "\n".join(lines) + "\n"


def _step_rows(step: Step) -> list[tuple[str, ...]]:
    shared = (str(step.returned), f"{step.int8_share:.1%}", f"{step.size_bytes / 1e6:.2f}")
    return [
        (
            *shared,
            cost.backend,
            f"{cost.worst_ap:+.2f}",
            f"{cost.accuracy:+.2f}",
            f"{cost.flips:.2f}",
            f"{cost.ece:+.2f}",
            "no" if step.excess else "yes",
        )
        for cost in step.costs
    ]


def _layer_row(layer: LayerSensitivity, search: Int8Search) -> tuple[str, ...]:
    return (
        layer.name,
        "n/a" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        f"{layer.logit_std:.4f}",
        f"{layer.share:.2%}",
        "floating point" if layer.name in search.returned else "INT8",
    )
