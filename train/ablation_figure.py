"""The picture of a study: bars of every variant by generator, with the spread over seeds, as in Figs. 3 and 4."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from train.ablation_report import OVER_GENERATORS, AblationReport
from train.ablation_tables import TITLES
from train.checkpoint import write_atomically

PANELS = ("ap", "accuracy_at_half")
WIDTH = 0.8  # of a generator's bars together
INCHES_A_BAR, SMALLEST, LARGEST = 0.16, 7.0, 40.0


def write_ablation_figure(report: AblationReport, path: Path) -> None:
    """Writes the PNG, atomically: AP and accuracy at 0.5 for each split; generators without both classes have no AP."""
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    splits = report.splits
    groups = max((len(v.figures[s]) for v in report.variants for s in v.figures), default=1)
    width = min(max(SMALLEST, 2 + INCHES_A_BAR * groups * (len(report.variants) + 1)), LARGEST)
    figure = Figure(figsize=(width, 1 + 3.2 * len(PANELS) * len(splits)), layout="constrained")
    rows = [(split, metric) for split in splits for metric in PANELS]
    for axes, (split, metric) in zip(np.atleast_1d(figure.subplots(len(rows) or 1, 1)), rows, strict=False):
        _draw(axes, report, split, metric)
    if rows:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(width // 2.2)), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _draw(axes: Any, report: AblationReport, split: str, metric: str) -> None:
    import matplotlib

    shown = [variant for variant in report.variants if split in variant.figures]
    groups = list(shown[0].figures[split])
    colours = matplotlib.colormaps["tab10" if len(report.variants) <= 10 else "tab20"].colors
    step = WIDTH / len(report.variants)
    for number, variant in enumerate(report.variants):
        figures = [variant.figures[split][group][metric] if variant in shown else None for group in groups]
        places = np.arange(len(groups)) - WIDTH / 2 + (number + 0.5) * step
        axes.bar(
            places,
            [np.nan if f is None else 100 * f.mean for f in figures],
            step * 0.95,
            yerr=[0.0 if f is None or f.std is None else 100 * f.std for f in figures],
            capsize=2,
            error_kw={"linewidth": 1},
            color=colours[number % len(colours)],
            label=variant.name + (" (FAILED)" if variant.failed else ""),
        )
    axes.axhline(50, color="0.3", linestyle="--", linewidth=1, label="chance for classes of equal size")
    axes.set_xticks(np.arange(len(groups)), [g.replace(OVER_GENERATORS, "mean") for g in groups], rotation=20)
    axes.set(ylim=(0, 102), ylabel=f"{TITLES[metric]} in percent", title=f"{split}: {TITLES[metric]}")
    axes.set_xlim(-0.6, len(groups) - 0.4)
