"""The picture of the loss benchmark: time and memory over N, from the results file alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from benchmarks.loss_contenders import BLOCKWISE, FUSED, STRAIGHTFORWARD, SUPCON
from benchmarks.loss_memory import BOTH
from train.checkpoint import write_atomically

SMALLEST_SHOWN = 256
STYLES = {
    ("with traces", STRAIGHTFORWARD): ("straightforward PyTorch", "C0", "o-"),
    ("without traces", SUPCON): ("SupConLoss (no traces)", "C1", "s-"),
    ("with traces", BLOCKWISE): ("blockwise PyTorch", "C2", "^-"),
    ("with traces", FUSED): ("fused", "C3", "D-"),
    ("without traces", FUSED): ("fused (no traces)", "C3", "D:"),
}


def curves(results: dict[str, Any], table: str, key: str, **wanted: object) -> dict[tuple[str, str], list[tuple]]:
    """For each contest and contender, its (N, figure) pairs, ascending.

    Args:
        results: the results file.
        table: "rows" or "memory".
        key: the figure's name in a row.
        wanted: what a row has to say to be taken.
    """
    found: dict[tuple[str, str], list[tuple]] = {}
    for row in results[table]:
        if row["n"] >= SMALLEST_SHOWN and all(row[name] == value for name, value in wanted.items()):
            found.setdefault((row["contest"], row["contender"]), []).append((row["n"], row[key]))
    return {who: sorted(pairs) for who, pairs in found.items()}


def write_figure(path: Path, results: dict[str, Any], *, precision: str = "float32") -> None:
    """Writes the PNG, atomically."""
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = curves(results, "rows", "median_ms", direction="both", precision=precision)
    memory = curves(results, "memory", "extra_mib", calls=BOTH, precision=precision)
    for axes, lines in ((left, times), (right, memory)):
        for who, (label, colour, style) in STYLES.items():
            if who in lines:
                n, values = zip(*lines[who], strict=True)
                axes.plot(n, values, style, color=colour, label=label, markersize=4, linewidth=1.5)
        axes.set(xscale="log", yscale="log", xlabel="N, rows in the batch")
        ticks = sorted({n for pairs in lines.values() for n, _ in pairs if n & (n - 1) == 0})
        axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    _add_slopes(left, times, 2, "N squared")
    _add_slopes(right, memory, 1, "N")
    left.set(ylabel="ms", title="Forward and backward, median time")
    right.set(ylabel="MiB", title="Forward and backward, extra memory")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    machine, settings = results["environment"]["machine"], results["settings"]
    where = settings["gpu"] or f"{machine['cpu']}, {settings['threads']} threads"
    figure.suptitle(
        f"Soft contrastive loss, C = {settings['width']}, J = N / 2, {precision}, {where}", fontsize="medium"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _add_slopes(axes: Any, lines: dict[tuple[str, str], list[tuple]], power: int, label: str) -> None:
    """A grey line of the stated growth through the fused loss's last point."""
    fused = lines.get(("with traces", FUSED))
    if not fused or not fused[-1][1]:
        return
    (first, _), (last, value) = fused[0], fused[-1]
    axes.plot(
        [first, last],
        [value * (first / last) ** power, value],
        "--",
        color="0.6",
        linewidth=1,
        label=f"grows as {label}",
    )
