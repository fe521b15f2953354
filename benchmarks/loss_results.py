"""The results file of the loss benchmark, its tables and its place in the README."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_checks import as_dicts, checks
from benchmarks.loss_contenders import (
    BLOCKWISE,
    FUSED,
    SETTINGS,
    STRAIGHTFORWARD,
    SUPCON,
    LossBenchmarkError,
)
from benchmarks.loss_figure import write_figure
from benchmarks.loss_memory import BOTH
from benchmarks.loss_race import MATMUL_SIDE
from benchmarks.tables import with_tables
from train.provenance import environment, package_versions

RESULTS = {"cpu": Path("benchmarks/results/loss.json"), "cuda": Path("benchmarks/results/loss_cuda.json")}
BEGIN, END = "<!-- loss: begin -->", "<!-- loss: end -->"
# Where pytest-benchmark's extra_info carries the rows.
TIME_ROWS, MEMORY_ROWS = "loss_rows", "loss_memory"


def condensed(raw: dict[str, Any], device: str, wanted: Iterable[str]) -> dict[str, Any]:
    """What is kept of a run: environment, settings, rows, memory and, on a CPU, checks.

    Args:
        raw: what pytest-benchmark wrote.
        device: "cpu" or "cuda".
        wanted: names of the benchmarks that have to be in it.

    Raises:
        LossBenchmarkError: one of them is not.
    """
    found = {entry["name"]: entry["extra_info"] for entry in raw["benchmarks"]}
    missing = sorted(
        set(wanted) - {name for name, info in found.items() if info.get(TIME_ROWS) or info.get(MEMORY_ROWS)}
    )
    if missing:
        raise LossBenchmarkError(
            "the run",
            got=f"no figures from {', '.join(missing)}",
            wanted="all of them",
            remedy="nothing was written; read above what failed",
        )
    rows = [row for info in found.values() for row in info.get(TIME_ROWS, [])]
    memory = [row for info in found.values() for row in info.get(MEMORY_ROWS, [])]
    return {
        "environment": _environment(),
        "settings": {
            **SETTINGS,
            "device": device,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "threads": rows[0]["threads"],
            "matmul_side": MATMUL_SIDE,
        },
        "rows": rows,
        "memory": memory,
        "checks": as_dicts(checks(rows, memory)) if device == "cpu" else [],
    }


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = environment()
    peer = "pytorch-metric-learning"
    found["versions"] = {**found["versions"], peer: package_versions([peer])[peer]}
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables of a results file: against straightforward PyTorch, against the peer, and the checks."""
    machine, settings, versions = (
        results["environment"]["machine"],
        results["settings"],
        results["environment"]["versions"],
    )
    where = settings["gpu"] or f"{machine['cpu']}, {settings['threads']} threads"
    lines = [
        f"{where}, Python {machine['python']}, torch {versions['torch']}, pytorch-metric-learning "
        f"{versions['pytorch-metric-learning']}; C = {settings['width']}, J = N / 2. Times are medians ± half the "
        "interquartile range, forward and backward together; contenders take turns within a run, ratios are medians "
        f"over rounds. The share is that of the rate of a {settings['matmul_side']}^3 matrix product timed beside each "
        "row, with 2 N C (3 N + 2 J) operations counted."
    ]
    for precision in dict.fromkeys(row["precision"] for row in results["rows"]):
        for table in (_main_table, _peer_table, _memory_table):
            lines += ["", *table(results, precision)]
    if results["checks"]:
        lines += ["", *checks_table(results["checks"])]
    return "\n".join(lines)


def _main_table(results: dict[str, Any], precision: str) -> list[str]:
    contenders = (STRAIGHTFORWARD, BLOCKWISE, FUSED)
    lines = [
        f"| {precision}: N | {STRAIGHTFORWARD} | {BLOCKWISE} | {FUSED} | {FUSED}: times faster | forward | backward | "
        f"{BLOCKWISE}: share of matrix product | {FUSED} |",
        "|" + "---:|" * 9,
    ]
    times = _times(results, "with traces", precision)
    for n in sorted({n for _, n, _ in times}):
        cells = [
            str(n),
            *(_milliseconds(times.get((who, n, "both"))) for who in contenders),
            *(_ratio(times.get((FUSED, n, direction))) for direction in ("both", "forward", "backward")),
            *(_share(times.get((who, n, "both"))) for who in (BLOCKWISE, FUSED)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _peer_table(results: dict[str, Any], precision: str) -> list[str]:
    lines = [
        f"| {precision}, without traces: N | {SUPCON} | {FUSED} | {FUSED}: times faster | forward | backward |",
        "|" + "---:|" * 6,
    ]
    times = _times(results, "without traces", precision)
    for n in sorted({n for _, n, _ in times}):
        cells = [
            str(n),
            *(_milliseconds(times.get((who, n, "both"))) for who in (SUPCON, FUSED)),
            *(_ratio(times.get((FUSED, n, direction))) for direction in ("both", "forward", "backward")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _memory_table(results: dict[str, Any], precision: str) -> list[str]:
    columns = (
        ("with traces", STRAIGHTFORWARD),
        ("without traces", SUPCON),
        ("with traces", BLOCKWISE),
        ("with traces", FUSED),
    )
    lines = [
        f"| {precision}, extra memory: N | " + " | ".join(who for _, who in columns) + " |",
        "|" + "---:|" * 5,
    ]
    chosen = [row for row in results["memory"] if (row["precision"], row["calls"]) == (precision, BOTH)]
    found = {(row["contest"], row["contender"], row["n"]): f"{row['extra_mib']:.1f} MiB" for row in chosen}
    rows = [[str(n), *(found.get((*column, n), "") for column in columns)] for n in sorted({n for _, _, n in found})]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def checks_table(found: list[dict[str, Any]]) -> list[str]:
    """The checks of a results file as Markdown."""
    lines = ["| check | wanted | measured | |", "|---|---:|---:|---|"]
    for check in found:
        measured = "not measured" if check["measured"] is None else f"{check['measured']:g}"
        met = "met" if check["met"] else "**not met**"
        lines.append(f"| {check['name']} | {check['bound']} {check['wanted']:g} | {measured} | {met} |")
    return lines


def _times(results: dict[str, Any], contest: str, precision: str) -> dict[tuple[str, int, str], dict[str, Any]]:
    rows = [row for row in results["rows"] if (row["contest"], row["precision"]) == (contest, precision)]
    return {(row["contender"], row["n"], row["direction"]): row for row in rows}


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    half = float(f"{row['iqr_ms'] / 2:.2g}")  # two digits, without an exponent
    return f"{row['median_ms']:.4g} ± {half:g} ms"


def _ratio(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["times_faster"] is None else f"{row['times_faster']:.2f}"


def _share(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['matmul_share']:.0f} %"


def write(results: dict[str, Any], path: Path, readme: Path | None) -> None:
    """Writes the results file, the picture beside it and, where given, the README's tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_figure(path.with_suffix(".png"), results)
    if readme is not None:
        document = with_tables(readme.read_text(encoding="utf-8"), markdown(results), begin=BEGIN, end=END)
        readme.write_text(document, encoding="utf-8")
