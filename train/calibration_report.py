"""The calibration part of an evaluation's report: its Markdown and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.manifest import CalibrationSpec
from train.calibration import CalibrationReport, ProbabilityFigures, SetCalibration, Share, ThresholdRow, ThresholdTable
from train.drawing import write_png
from train.markdown import markdown_table, percent
from train.validation_scores import SCORES_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CALIBRATION_FIGURE_FILE = "calibration.png"
POOLED = "all pictures"
RULES = {
    "empirical": "the rates are kept on the validation pictures themselves; on new ones like them they are expected to "
    "be up to 1 / (n + 1) higher, n being the validation pictures of the class",
    "conformal": "class-conditional split conformal; on new pictures that are exchangeable with the validation "
    "pictures, the rates are expected to be at most the wanted ones (Vovk et al. 2005; Angelopoulos & Bates 2021, "
    "arXiv:2107.07511)",
}


def calibration_section(report: CalibrationReport, calibration: CalibrationSpec) -> str:
    """The section for reading."""
    sets = {POOLED: report.pooled} | report.generators
    parts = [
        f"Calibrated logit = logit / {calibration.temperature:.4g} {calibration.bias:+.4g} (temperature: Guo et al. "
        "2017, arXiv:1706.04599; bias: Platt 1999), fitted on the run's validation pictures. ECE and Brier in percent, "
        "NLL in nats; before: sigmoid of the raw logit, after: the calibrated probability. Lower is better.",
        _probability_table(sets),
        _figure_line(report),
        "### Coverage",
        f"Rule of the thresholds: {calibration.threshold_rule}: {RULES[calibration.threshold_rule]}. Wanted: at least "
        f"{_fine(1 - calibration.real_flagged_rate)} % of real pictures not called `fake`, and "
        f"{_fine(1 - calibration.fake_missed_rate)} % of fakes not called `real`. Pictures of another generator or "
        "source are not exchangeable with the validation pictures, so no rule promises anything for them: "
        "what was reached is measured here. Brackets: 95 % Wilson intervals, which take pictures as independent.",
        _coverage_table(sets, calibration),
        "### Thresholds for other rates",
        _no_thresholds() if report.thresholds is None else _threshold_part(report.thresholds, calibration),
    ]
    return "\n\n".join(parts)


def write_calibration_figure(path: Path, report: CalibrationReport) -> None:
    """Writes the PNG, atomically: reliability before and after, counts below, and wanted against reached rates."""
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 if report.thresholds else 9, 5), layout="constrained")
    panels = [["before", "after"], ["before count", "after count"]]
    if report.thresholds is not None:
        panels = [[*row, "rates"] for row in panels]
    axes = figure.subplot_mosaic(panels, height_ratios=[4, 1])
    for name, title in (("before", "before calibration"), ("after", "after calibration")):
        _draw_reliability(axes[name], axes[f"{name} count"], report, name, title)
    if report.thresholds is not None:
        _draw_rates(axes["rates"], report.thresholds)
    write_png(path, figure, dpi=110)


def _probability_table(sets: Mapping[str, SetCalibration]) -> str:
    head = ("set", "ECE before", "ECE after", "Brier before", "Brier after", "NLL before", "NLL after")
    rows = []
    for name, entry in sets.items():
        b, a = entry.before, entry.after
        shares = map(percent, (b.ece, a.ece, b.brier, a.brier))
        rows.append((name, *shares, f"{b.nll:.3f}", f"{a.nll:.3f}"))
    return markdown_table(head, rows)


def _figure_line(report: CalibrationReport) -> str:
    rates = ", and wanted against reached rates" if report.thresholds is not None else ""
    return f"![Reliability before and after calibration{rates}]({CALIBRATION_FIGURE_FILE})"


def _coverage_table(sets: Mapping[str, SetCalibration], calibration: CalibrationSpec) -> str:
    wanted = _fine(1 - calibration.real_flagged_rate), _fine(1 - calibration.fake_missed_rate)
    head = ("set", f"real not called fake, wanted {wanted[0]}", f"fake not called real, wanted {wanted[1]}")
    return markdown_table(head, [(name, _share(s.real_covered), _share(s.fake_covered)) for name, s in sets.items()])


def _no_thresholds() -> str:
    return (
        f"n/a: the run has no {SCORES_FILE}, since it was trained before that was kept; "
        "`python -m train.run --resume RUN` writes it and changes nothing else in a finished run."
    )


def _threshold_part(table: ThresholdTable, calibration: CalibrationSpec) -> str:
    rows = [_threshold_cells(row) for row in table.rows]
    note = (
        f"Fitted on the run's {table.validation_real:,} real validation pictures ({calibration.threshold_rule} rule), "
        "measured on the pictures of this report. `fake missed` counts every fake that is not called `fake`. Worst: "
        "the generator with the largest share."
    )
    head = ("wanted real flagged", "logit threshold", "real flagged", "worst flagged", "fake missed", "worst missed")
    return note + "\n\n" + markdown_table(head, rows)


def _threshold_cells(row: ThresholdRow) -> tuple[str, ...]:
    wanted = f"{_fine(row.wanted)} %"
    if row.threshold is None or row.pooled is None:
        return wanted, f"n/a: needs {row.needed:,} real validation pictures", *("n/a",) * 4
    reached = row.generators
    return (
        wanted,
        f"{row.threshold:.4g}",
        _share(row.pooled.real_flagged),
        _worst({name: r.real_flagged for name, r in reached.items()}),
        _share(row.pooled.fake_missed),
        _worst({name: r.fake_missed for name, r in reached.items()}),
    )


def _worst(shares: Mapping[str, Share | None]) -> str:
    known = {name: share.share for name, share in shares.items() if share is not None}
    if not known:
        return "n/a"
    name = max(known, key=lambda key: known[key])
    return f"{percent(known[name])} {name}"


def _share(share: Share | None) -> str:
    if share is None:
        return "n/a"
    return f"{percent(share.share)} [{percent(share.low)}, {percent(share.high)}]"


def _fine(share: float) -> str:
    """Percent with as many digits as a rate that a person typed has."""
    return f"{100 * share:.6g}"


def _points(figures: ProbabilityFigures) -> tuple[list[float], list[float], list[int]]:
    """Stated probability, observed share and pictures of the bins that hold any."""
    filled = [b for b in figures.bins if b.pictures]
    return (
        [b.mean_probability or 0.0 for b in filled],
        [b.fake_share or 0.0 for b in filled],
        [b.pictures for b in filled],
    )


def _draw_reliability(axes: Axes, counts: Axes, report: CalibrationReport, name: str, title: str) -> None:
    figures: ProbabilityFigures = getattr(report.pooled, name)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    for number, entry in enumerate(report.generators.values()):
        stated, observed, _ = _points(getattr(entry, name))
        axes.plot(stated, observed, color="0.75", linewidth=0.8, label=None if number else "each generator")
    stated, observed, pictures = _points(figures)
    axes.plot(stated, observed, color="C0", linewidth=2, label=POOLED)
    axes.scatter(stated, observed, s=[12 + 150 * n / max(pictures) for n in pictures], color="C0", zorder=3)
    axes.set(ylabel="share of fakes", title=f"{title}: ECE {percent(figures.ece)} %, NLL {figures.nll:.3f}")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend(loc="upper left", fontsize="small")
    width = 1 / len(figures.bins)
    counts.bar([b.low for b in figures.bins], [b.pictures for b in figures.bins], width=width, align="edge", color="C0")
    counts.set(xlim=(-0.03, 1.03), xlabel="stated probability of being fake", ylabel="pictures")


def _draw_rates(axes: Axes, table: ThresholdTable) -> None:
    axes.set(title="real flagged: wanted and reached", xlabel="wanted, %", ylabel="reached, %")
    rows = [row for row in table.rows if row.pooled is not None and row.pooled.real_flagged is not None]
    if not rows:
        axes.text(0.5, 0.5, "too few real pictures", ha="center", transform=axes.transAxes)
        return
    wanted = [100 * row.wanted for row in rows]
    axes.plot(wanted, wanted, color="0.7", linestyle=":", linewidth=1)
    label: str | None = "each generator"
    for name in rows[0].generators:
        own = [row.generators[name].real_flagged for row in rows]
        if own[0] is not None:
            axes.plot(wanted, [100 * share.share for share in own], color="0.75", linewidth=0.8, label=label)
            label = None
    pooled = [row.pooled.real_flagged for row in rows]
    bars = [[100 * (s.share - s.low) for s in pooled], [100 * (s.high - s.share) for s in pooled]]
    reached = [100 * s.share for s in pooled]
    axes.errorbar(wanted, reached, yerr=bars, color="C0", marker="o", capsize=3, label=f"{POOLED}, 95 %")
    # Linear below 0.1 %, so that a rate of 0 has a place.
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xticks(wanted, [f"{w:g}" for w in wanted])
    ticks = (0, 0.1, 0.5, 1, 5, 10, 50, 100)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, max(100 * s.high for s in pooled) * 3)
    axes.legend(loc="upper left", fontsize="small")
