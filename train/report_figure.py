"""The picture of an evaluation: ROC of each generator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from train.drawing import plain_label, write_png
from train.metrics import Array, Labels

FIGURE_SIDE = 6.0  # inches
MAX_LEGEND = 14


def write_figure(
    path: Path,
    logits: Array,
    labels: Labels,
    rows: Mapping[str, np.ndarray],
) -> None:
    """Writes the PNG, atomically.

    Args:
        path: file to write.
        logits: (N,) float, raw.
        labels: (N,) int, 0 real, 1 fake.
        rows: indices of each generator's pictures, in the legend's order.
    """
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_SIDE, FIGURE_SIDE), layout="constrained")
    axes = figure.subplots()
    for number, (name, index) in enumerate(rows.items()):
        if len(np.unique(labels[index])) == 2:
            flagged, found, _ = roc_curve(labels[index], logits[index])
            style = ("-", "--", "-.", ":")[number // 10 % 4]  # ten colours, then another stroke
            axes.plot(flagged, found, style, label=plain_label(name), linewidth=1.5)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    axes.set(xlabel="real flagged", ylabel="fakes found", title="ROC per generator, worst first", aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize="small", ncols=1 + len(rows) // MAX_LEGEND)
    write_png(path, figure, dpi=120)
