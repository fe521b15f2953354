"""The picture of an evaluation: ROC of each generator, and how well stated probabilities hold."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from runtime.manifest import CalibrationSpec
from train.checkpoint import write_atomically
from train.metrics import Array, Labels

NO_CALIBRATION = CalibrationSpec(1.0, 0.0, 0.0, 0.0, 0.5, 0.5)
MAX_LEGEND = 14


def write_figure(
    path: Path,
    logits: Array,
    labels: Labels,
    rows: Mapping[str, np.ndarray],
    calibration: CalibrationSpec,
) -> None:
    """Writes the PNG, atomically.

    Args:
        path: file to write.
        logits: (N,) float, raw.
        labels: (N,) int, 0 real, 1 fake.
        rows: indices of each generator's pictures, in the legend's order.
        calibration: from validation pictures.
    """
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    roc, reliability = figure.subplots(1, 2)
    for number, (name, index) in enumerate(rows.items()):
        if len(np.unique(labels[index])) == 2:
            flagged, found, _ = roc_curve(labels[index], logits[index])
            style = ("-", "--", "-.", ":")[number // 10 % 4]  # ten colours, then another stroke
            roc.plot(flagged, found, style, label=name, linewidth=1.5)
    roc.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    roc.set(xlabel="real flagged", ylabel="fakes found", title="ROC per generator, worst first", aspect="equal")
    if roc.get_legend_handles_labels()[0]:
        roc.legend(loc="lower right", fontsize="small", ncols=1 + len(rows) // MAX_LEGEND)
    reliability.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    for title, spec, marker in (("before", NO_CALIBRATION, "o"), ("after", calibration, "s")):
        observed, stated = calibration_curve(labels, spec.fake_probability(logits), n_bins=10)
        reliability.plot(stated, observed, marker=marker, markersize=4, label=f"{title} calibration")
    reliability.set(
        xlabel="stated probability of being fake",
        ylabel="share of fakes",
        title="Reliability, all pictures",
        aspect="equal",
    )
    reliability.legend(loc="upper left", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
