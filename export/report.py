"""Tables for the screen, and where a verification is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from export.batch_invariance import BatchInvariance
from export.latency import END_TO_END, STAGES, LatencySweep
from runtime.golden import GoldenCheck
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

LEFT_OUT = "left out"

Rows = Sequence[tuple[str, ParitySpec]]


def graph_name(precision: str, remainder: str = "fp32") -> str:
    """What a graph is called in reports: its precision, and what it computes in between where that is not FP32."""
    return precision if remainder == "fp32" else f"{precision}+{remainder}"


def graph_parts(name: str) -> tuple[str, str]:
    """Precision and remainder of a graph that `graph_name` named."""
    precision, _, remainder = name.partition("+")
    return precision, remainder or "fp32"


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
    return _table(title, COLUMNS, parity_rows(rows))


def check_table(golden: Sequence[GoldenCheck], invariance: Sequence[BatchInvariance]) -> Table:
    """Table for the screen: the worst output of the golden inputs, and the largest logit difference in batches.

    Args:
        golden: of every precision and back-end.
        invariance: of the same, in the same order.
    """
    rows = []
    for check, batches in zip(golden, invariance, strict=True):
        worst = check.worst
        rows.append(
            [
                check.precision,
                check.backend,
                f"{check.differences[worst]:.1e}",
                f"{check.limits[worst]:.0e}",
                f"{batches.logit_diff_max:.1e}",
                f"{batches.limit:.0e}",
                "FAIL" if check.broken() or batches.broken() else "pass",
            ]
        )
    title = "golden inputs: relative difference; in batches: logit difference to the picture alone"
    return _table(title, ("precision", "back-end", "golden inputs", "at most", "in batches", "at most", "result"), rows)


def latency_table(sweep: LatencySweep) -> Table:
    """Table for the screen: median ms of a single picture at each stage, and the most pictures a second end to end."""
    medians = {(x.precision, x.backend, x.stage): f"{x.p50_ms:.2f}" for x in sweep.measured if x.batch == 1}
    rows = []
    keys = [(x.precision, x.backend) for x in sweep.measured] + [(x.precision, x.backend) for x in sweep.left_out]
    for key in dict.fromkeys(keys):
        rates = [
            x.pictures_per_second for x in sweep.measured if (x.precision, x.backend) == key and x.stage == END_TO_END
        ]
        most = f"{max(rates):.1f}" if rates else LEFT_OUT
        rows.append([*key, *(medians.get((*key, stage), LEFT_OUT) for stage in STAGES), most])
    title = "median ms of a single picture, and the most pictures a second end to end"
    return _table(title, ("precision", "back-end", *STAGES, "pictures/s"), rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="left" if index < 2 else "right")
    for cells in rows:
        table.add_row(*cells, style="bold red" if cells[-1] == "FAIL" else None)
    return table
