"""The picture of an embedding map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.drawing import plain_label, write_png
from train.embedding_map import EmbeddingMap, MapPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One of each for a generator; marks change where the colours, matplotlib's but for its grey, come round again.
SEEN_MARKS, UNSEEN_MARKS = "osDph", "^v<>d"
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
REAL: dict[str, Any] = {"marker": "o", "color": "0.6", "s": 16, "alpha": 0.6, "linewidths": 0}
TRACE: dict[str, Any] = {"marker": "+", "color": "black", "s": 26, "alpha": 0.7, "linewidths": 0.8, "zorder": 2}
# Beneath its traces, which may all lie there.
MEAN_TRACE: dict[str, Any] = {"marker": "*", "color": "gold", "s": 260, "edgecolors": "black", "zorder": 1.5}
MAX_LEGEND = 26


def write_embedding_map(path: Path, embedding_map: EmbeddingMap) -> None:
    """Writes the PNG, atomically.

    Args:
        path: file to write.
        embedding_map: what its JSON file holds.
    """
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    report, points = embedding_map.report, embedding_map.points
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots()
    pictures = [point for point in points if point.kind == "picture"]
    _scatter(axes, [p for p in pictures if p.label == 0], "real", REAL)
    for number, generator in enumerate(report.generators):
        fakes = [p for p in pictures if p.label == 1 and p.generator == generator.name]
        seen = {True: ", trained on", False: ", unseen", None: ""}[generator.seen_in_training]
        style = _mark(number, filled=generator.seen_in_training is not False)
        _scatter(axes, fakes, f"fake: {plain_label(generator.name)}{seen}", style)
    _scatter(axes, [p for p in points if p.kind == "trace"], "natural traces h of the real", TRACE)
    _scatter(axes, [p for p in points if p.kind == "mean trace"], "mean natural trace", MEAN_TRACE)
    axes.set(title=f"t-SNE of {report.space}", xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    columns = 1 + len(report.generators) // MAX_LEGEND
    figure.legend(loc="outside right upper", fontsize="small", ncols=columns)
    write_png(path, figure, dpi=110)


def _scatter(axes: Axes, points: Sequence[MapPoint], label: str, style: dict[str, Any]) -> None:
    if points:
        count = f" ({len(points):,})" if len(points) > 1 else ""
        axes.scatter([p.x for p in points], [p.y for p in points], label=label + count, **style)


def _mark(number: int, *, filled: bool) -> dict[str, Any]:
    turn, place = divmod(number, len(COLOURS))
    colour = COLOURS[place]
    marks = SEEN_MARKS if filled else UNSEEN_MARKS
    marker = marks[turn % len(marks)]
    if filled:
        return {"marker": marker, "color": colour, "s": 20, "alpha": 0.8, "linewidths": 0}
    return {"marker": marker, "facecolors": "none", "edgecolors": colour, "s": 24, "linewidths": 0.9}
