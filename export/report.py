"""Tables of parity figures: for the screen, and as JSON and Markdown files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from export.parity import LIMITS
from runtime.manifest import ParitySpec

COLUMNS = (
    "precision",
    "back-end",
    "max diff",
    "mean diff",
    "AP pts",
    "acc pts",
    "flips/opp",
    "result",
)

# Where a verification is kept in the folder of the run.
REPORT_FOLDER = Path("report") / "verify"
JSON_FILE, MARKDOWN_FILE = "verify.json", "verify.md"

Rows = Sequence[tuple[str, ParitySpec]]


def parity_rows(rows: Rows) -> list[list[str]]:
    """Cells of the table, one row for each precision and back-end."""
    return [
        [
            precision,
            parity.backend,
            f"{parity.logit_diff_max:.2e}",
            f"{parity.logit_diff_mean:.2e}",
            "n/a" if parity.ap_change_points is None else f"{parity.ap_change_points:+.2f}",
            f"{parity.accuracy_change_points:+.2f}",
            f"{parity.verdict_flips}/{parity.opposite_verdicts}",
            "pass" if parity.passed else "FAIL",
        ]
        for precision, parity in rows
    ]


def parity_table(rows: Rows) -> Table:
    """Table for the screen."""
    title = "against PyTorch FP32: logit differences, changes of AP and accuracy in points"
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=True, justify="left" if index < 2 else "right")
    for cells in parity_rows(rows):
        table.add_row(*cells, style="bold red" if cells[-1] == "FAIL" else None)
    return table


def parity_json(rows: Rows, *, broken: Mapping[str, Sequence[str]], about: Mapping[str, Any]) -> str:
    """JSON of the comparison with its limits and where it was measured.

    Args:
        rows: precision and figures.
        broken: limits that are broken, by "<precision> on <back-end>".
        about: model, run, data, machine and versions.
    """
    content = {
        **about,
        "limits": {name: dataclasses.asdict(limits) for name, limits in LIMITS.items()},
        "comparisons": [
            {
                "precision": precision,
                **dataclasses.asdict(parity),
                "broken": list(broken[f"{precision} on {parity.backend}"]),
            }
            for precision, parity in rows
        ],
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def parity_markdown(rows: Rows, *, broken: Mapping[str, Sequence[str]], about: Mapping[str, Any]) -> str:
    """Markdown of the same."""
    lines = [
        f"# {about['model']} against PyTorch FP32",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells) + " |" for cells in parity_rows(rows)),
        "",
        *(f"- FAIL {where}: {'; '.join(what)}" for where, what in broken.items() if what),
        "",
        "max and mean diff: of the raw logits; AP pts, acc pts: change in percentage points, accuracy at each",
        "precision's own threshold; flips/opp: verdicts that differ, and how many of them between real and fake.",
        "",
        "Limits (logit differences are divided by the PyTorch model's temperature, or by a quarter of its logits'",
        "standard deviation where that is more):",
        "",
        *(f"- {name}: {_limits_text(name)}" for name in LIMITS),
        "",
        f"Measured on {about['environment']['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, *, as_json: str, as_markdown: str) -> tuple[Path, Path]:
    """Write both files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_FILE, folder / MARKDOWN_FILE
    paths[0].write_text(as_json, encoding="utf-8")
    paths[1].write_text(as_markdown, encoding="utf-8")
    return paths


def _limits_text(name: str) -> str:
    limits = dataclasses.asdict(LIMITS[name])
    reason = limits.pop("reason")
    return ", ".join(f"{key} {value:g}" for key, value in limits.items()) + f" ({reason})"
