"""The robustness part of an evaluation's report: its Markdown and its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.drawing import plain_label, write_png
from train.markdown import markdown_table, percent
from train.perturbations import OPERATIONS
from train.robustness import RobustnessCurve, RobustnessPoint, RobustnessReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROBUSTNESS_FIGURE_FILE = "robustness.png"
UNTOUCHED = "untouched"
CURVES_IN_A_ROW = 2
LEGEND_COLUMNS = 3


def robustness_section(report: RobustnessReport) -> str:
    """The section for reading."""
    parts = [
        f"{_sample_sentence(report)} Each picture, real or fake, was changed after decoding and before the detector's "
        "own crop. Figures in percent, unweighted means over the generators that have both classes; each generator "
        "stands in the JSON. `logit change`: mean |change| of the calibrated logit against the untouched picture. "
        "`flips`: share of pictures whose verdict is another than untouched; `opposite`: those of them that went from "
        "`real` to `fake` or back.",
        f"![AP and verdict flips over the strength of each operation]({ROBUSTNESS_FIGURE_FILE})",
    ]
    parts += [f"### {OPERATIONS[curve.operation].title}\n\n{_curve_table(curve)}" for curve in report.curves]
    return "\n\n".join(parts)


def write_robustness_figure(path: Path, report: RobustnessReport) -> None:
    """Writes the PNG, atomically: for each operation AP of every generator, and the share of verdicts that flip."""
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    rows = math.ceil(len(report.curves) / CURVES_IN_A_ROW)
    columns = min(CURVES_IN_A_ROW, len(report.curves))
    figure = Figure(figsize=(7 * columns, 2.9 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for number, curve in enumerate(report.curves):
        _draw_ranking(axes[2 * number], curve)
        _draw_flips(axes[2 * number + 1], curve)
    for spare in axes[2 * len(report.curves) :]:
        spare.set_axis_off()
    axes[1].legend(loc="best", fontsize="small")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=LEGEND_COLUMNS * columns)
    write_png(path, figure, dpi=100)


def _sample_sentence(report: RobustnessReport) -> str:
    counts = report.sample.values()
    taken, scored = sum(c.real + c.fake for c in counts), sum(c.real_of + c.fake_of for c in counts)
    if taken == scored:
        return f"All {scored:,} pictures."
    return (
        f"A sample of {taken:,} of the {scored:,} scored pictures: at most {report.limit:,} of each generator and "
        f"class, chosen by content hash (seed {report.seed}); `{UNTOUCHED}` is that sample as it is."
    )


def _curve_table(curve: RobustnessCurve) -> str:
    head = (
        OPERATIONS[curve.operation].axis,
        "AP",
        "AUC",
        "ACC thr",
        "real flagged",
        "fake missed",
        "logit change",
        "real flips",
        "real opposite",
        "fake flips",
        "fake opposite",
    )
    return markdown_table(head, [_cells(point) for point in curve.points])


def _cells(point: RobustnessPoint) -> tuple[str, ...]:
    m = point.mean
    metrics = (m.ap, m.auc, m.accuracy_at_threshold, m.real_flagged_rate, m.fake_missed_rate)
    change = "n/a" if m.logit_change is None else f"{m.logit_change:.2f}"
    flips = (m.real_flips, m.real_opposite, m.fake_flips, m.fake_opposite)
    return _strength(point), *map(percent, metrics), change, *map(percent, flips)


def _strength(point: RobustnessPoint) -> str:
    return UNTOUCHED if point.strength is None else f"{point.strength:g}"


def _draw_ranking(axes: Axes, curve: RobustnessCurve) -> None:
    """AP over strength; strengths stand at equal distances, since untouched has no number on most scales."""
    lowest = 100.0
    for number, name in enumerate(curve.points[0].generators):
        values = [point.generators[name].ap for point in curve.points]
        shown = _percents(values)
        lowest = min([lowest, *(value for value in shown if math.isfinite(value))])
        if any(value is not None for value in values):
            style = ("-", "--", "-.", ":")[number // 10 % 4]  # ten colours, then another stroke
            axes.plot(shown, style, color=f"C{number % 10}", linewidth=0.9, label=plain_label(name))
    axes.plot(_percents([point.mean.ap for point in curve.points]), color="black", linewidth=2.4, label="mean")
    _finish(axes, curve, "AP, %")
    axes.set_ylim(max(0.0, lowest - 4), 101)


def _draw_flips(axes: Axes, curve: RobustnessCurve) -> None:
    for label, color, all_flips, opposite in (
        ("real", "C0", "real_flips", "real_opposite"),
        ("fake", "C3", "fake_flips", "fake_opposite"),
    ):
        for name, style, title in ((all_flips, "-", "all flips"), (opposite, "--", "opposite")):
            values = _percents([getattr(point.mean, name) for point in curve.points])
            axes.plot(values, style, color=color, marker="o", markersize=3, label=f"{label}: {title}")
    _finish(axes, curve, "verdicts that flip, %")
    axes.set_ylim(-2, 102)


def _finish(axes: Axes, curve: RobustnessCurve, ylabel: str) -> None:
    spec = OPERATIONS[curve.operation]
    names = ["none" if point.strength is None else _strength(point) for point in curve.points]
    axes.set_xticks(range(len(names)), names)
    axes.axvline(names.index("none"), color="0.85", linewidth=1, zorder=0)
    axes.set(xlabel=spec.axis, ylabel=ylabel, title=spec.title)


def _percents(shares: Sequence[float | None]) -> list[float]:
    """Shares in percent; a gap in the line where there is none."""
    return [math.nan if share is None else 100 * share for share in shares]
