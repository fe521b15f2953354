"""The pictures of a verification: logits against PyTorch, noise layer by layer, times over batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.latency import END_TO_END, GRAPH, Latency, LatencySweep
from export.layer_comparison import EQUAL_DB, LayerComparison, TensorError
from export.precision import LAYER_OPS
from export.verification import Scores
from runtime.backends import GRAPH_BACKENDS
from runtime.manifest import PRECISIONS
from train.drawing import plain_label, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
LABEL_MARKS = {0: ("o", "real"), 1: ("x", "fake")}
STROKES = ("-", "--", ":", "-.")
MAX_TICKS = 40


def write_logits_figure(path: Path, scores: Scores) -> None:
    """Difference of each picture's logit over PyTorch's logit, one panel for each graph; written atomically.

    Args:
        path: PNG to write.
        scores: of all graphs and back-ends.
    """
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    graphs = list(dict.fromkeys(graph for graph, _ in scores.found))
    figure = Figure(figsize=(4.4 * len(graphs), 4), layout="constrained")
    panels = figure.subplots(1, len(graphs), squeeze=False)[0]
    for axes, graph in zip(panels, graphs, strict=True):
        for (_, backend), logits in (item for item in scores.found.items() if item[0][0] == graph):
            difference = logits.astype(np.float64) - scores.reference
            for label, (mark, word) in LABEL_MARKS.items():
                mine = scores.labels == label
                name = plain_label(f"{backend}, {word}")
                style = {"color": _backend_colour(backend), "s": 14, "alpha": 0.6, "linewidths": 0.8}
                axes.scatter(scores.reference[mine], difference[mine], marker=mark, label=name, **style)
        _draw_thresholds(axes, scores)
        axes.set(title=graph, xlabel="logit of PyTorch FP32")
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    panels[0].set_ylabel("difference of the logit")
    for axes in dict.fromkeys((panels[0], panels[-1])):  # a graph for engines comes last, and on one back-end
        axes.legend(fontsize="small")
    write_png(path, figure, dpi=DPI)


def write_layers_figure(path: Path, comparisons: Sequence[LayerComparison]) -> None:
    """SQNR of every tensor in the order of the graph, one panel for each graph; written atomically.

    Args:
        path: PNG to write.
        comparisons: at least one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6 * len(comparisons)), layout="constrained")
    for axes, comparison in zip(figure.subplots(len(comparisons), squeeze=False)[:, 0], comparisons, strict=True):
        _draw_layers(axes, comparison)
    write_png(path, figure, dpi=DPI)


def write_latency_figure(path: Path, sweep: LatencySweep) -> None:
    """Median time over batch size, of the graph alone and end to end; written atomically.

    Args:
        path: PNG to write.
        sweep: what was timed.
    """
    from matplotlib.figure import Figure

    strokes = dict(zip(dict.fromkeys(latency.backend for latency in sweep.measured), cycle(STROKES), strict=False))
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2, sharey=True), (GRAPH, END_TO_END), strict=True):
        series: dict[tuple[str, str], list[Latency]] = {}
        for latency in sweep.measured:
            if latency.stage == stage:
                series.setdefault((latency.precision, latency.backend), []).append(latency)
        for (precision, backend), points in series.items():
            axes.errorbar(
                [p.batch for p in points],
                [p.p50_ms for p in points],
                yerr=[p.spread_ms for p in points],
                color=f"C{PRECISIONS.index(precision)}",
                linestyle=strokes[backend],
                marker=".",
                capsize=2,
                label=plain_label(f"{precision} on {backend}"),
            )
        _scale_times(axes, batches=sorted({latency.batch for latency in sweep.measured}))
        axes.set_title(stage)
        if series:
            axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("median ms, ± half the interquartile range")
    write_png(path, figure, dpi=DPI)


def _scale_times(axes: Axes, *, batches: Sequence[int]) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch size")
    axes.grid(visible=True, which="major", color="0.9")


def _backend_colour(backend: str) -> str:
    return f"C{GRAPH_BACKENDS.index(backend)}" if backend in GRAPH_BACKENDS else "C9"


def _draw_thresholds(axes: Axes, scores: Scores) -> None:
    axes.axhline(0.0, color="0.7", linewidth=1, zorder=0)
    for threshold in {scores.calibration.real_threshold, scores.calibration.fake_threshold}:
        axes.axvline(threshold, color="0.7", linestyle=":", linewidth=1, zorder=0)


def _draw_layers(axes: Axes, comparison: LayerComparison) -> None:
    layers = comparison.layers
    copies = [layer.tensor != layer.compared for layer in layers]
    for wanted, style, label in (
        (False, {"marker": ".", "linewidth": 1.2}, "tensors"),
        (True, {"marker": "x", "linestyle": "", "markersize": 4}, "their quantised or cast copies"),
    ):
        places = [place for place, copy in enumerate(copies) if copy == wanted]
        # Equal ones have no noise to draw.
        values = [np.nan if layers[place].sqnr_db >= EQUAL_DB else layers[place].sqnr_db for place in places]
        if places:
            axes.plot(places, values, label=label, **style)  # type: ignore[arg-type]
    axes.axhline(comparison.bound_db, color="C3", linestyle="--", linewidth=1, label="bound")
    if (culprit := comparison.culprit) is not None:
        axes.axvline(layers.index(culprit), color="C3", linewidth=1, label=plain_label(f"first: {culprit.node}"))
    places = _named_places(layers)
    axes.set_xticks(places, [plain_label(layers[p].node) for p in places], rotation=90, fontsize="xx-small")
    axes.set(title=f"{comparison.precision} against fp32", ylabel="SQNR in dB")
    axes.legend(fontsize="small", loc="upper center", ncols=4)


def _named_places(layers: Sequence[TensorError]) -> list[int]:
    """Places of the layers with weights, thinned out until their names can be read."""
    places = [place for place, layer in enumerate(layers) if layer.op_type in LAYER_OPS]
    return places[:: 1 + len(places) // MAX_TICKS]
