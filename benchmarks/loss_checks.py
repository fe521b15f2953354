"""What the fused loss is held to on a CPU, as named checks: wanted, measured, met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.loss_contenders import FUSED
from benchmarks.loss_memory import BOTH, FORWARD

SMALLEST_ROWS = 64
# Exponents of growth are taken between these, where fixed costs no longer count.
GROWTH_FROM, GROWTH_TO = 8192, 32768

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """A figure and its bound.

    Attributes:
        name: what is measured, with its unit.
        bound: "at least" or "at most".
        wanted: the bound's value.
        measured: the figure; None where the run did not measure it.
        met: whether it keeps to the bound; what was not measured does not.
    """

    name: str
    bound: str
    wanted: float
    measured: float | None
    met: bool

    def sentence(self) -> str:
        """What was wanted and what came out."""
        measured = "was not measured" if self.measured is None else f"measured {self.measured:g}"
        return f"{self.name}: wanted {self.bound} {self.wanted:g}, {measured}"


def checks(rows: Rows, memory: Rows) -> list[Check]:
    """Every check, on the rows of times and of memory."""
    return [_check(name, bound, wanted, measure(rows, memory)) for name, bound, wanted, measure in _PROMISES]


def unmet_of_some(rows: Rows, memory: Rows) -> list[str]:
    """The sentences of those checks that these rows alone show to be missed; what they do not measure is left out."""
    return [check.sentence() for check in checks(rows, memory) if check.measured is not None and not check.met]


def as_dicts(found: Iterable[Check]) -> list[dict[str, Any]]:
    """For the results file."""
    return [asdict(check) for check in found]


def _check(name: str, bound: str, wanted: float, measured: float | None) -> Check:
    # A figure that is not a number misses both bounds.
    met = measured is not None and (measured >= wanted if bound == "at least" else measured <= wanted)
    return Check(name, bound, wanted, measured, met)


def _fused(rows: Rows, **wanted: object) -> Rows:
    chosen = {"contest": "with traces", "contender": FUSED, "precision": "float32", **wanted}
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def _only(rows: Rows, key: str) -> float | None:
    return rows[0][key] if len(rows) == 1 else None


def _time(n: int, key: str) -> Callable[[Rows, Rows], float | None]:
    return lambda rows, memory: _only(_fused(rows, n=n, direction="both"), key)


def _memory(n: int, calls: str, key: str) -> Callable[[Rows, Rows], float | None]:
    return lambda rows, memory: _only(_fused(memory, n=n, calls=calls), key)


def _slowest(rows: Rows, memory: Rows) -> float | None:
    ratios = [row["times_faster"] for row in _fused(rows, direction="both") if row["n"] >= SMALLEST_ROWS]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _growth(
    smaller: Callable[[Rows, Rows], float | None], larger: Callable[[Rows, Rows], float | None]
) -> Callable[[Rows, Rows], float | None]:
    def exponent(rows: Rows, memory: Rows) -> float | None:
        low, high = smaller(rows, memory), larger(rows, memory)
        if not low or not high:
            return None
        return round(math.log(high / low) / math.log(GROWTH_TO / GROWTH_FROM), 3)

    return exponent


# Times are of forward and backward together; the baseline is cpp_ext/reference.py in float32.
_PROMISES: list[tuple[str, str, float, Callable[[Rows, Rows], float | None]]] = [
    ("N = 8192, times faster than straightforward PyTorch", "at least", 6.0, _time(8192, "times_faster")),
    ("N = 8192, share of a 4096^3 matrix product's rate", "at least", 0.8, _time(8192, "matmul_share")),
    ("N = 1024, times faster than straightforward PyTorch", "at least", 2.0, _time(1024, "times_faster")),
    ("every N from 64 up, times faster than straightforward PyTorch, the slowest", "at least", 1.0, _slowest),
    ("N = 8192, extra memory in MiB", "at most", 64.0, _memory(8192, BOTH, "extra_mib")),
    ("N = 65536, forward, whole process in MiB", "at most", 1024.0, _memory(65536, FORWARD, "whole_process_mib")),
    (
        "N = 8192 to 32768, memory grows as N to the power",
        "at most",
        1.1,
        _growth(_memory(GROWTH_FROM, BOTH, "extra_mib"), _memory(GROWTH_TO, BOTH, "extra_mib")),
    ),
    (
        "N = 8192 to 32768, time grows as N to the power",
        "at most",
        2.1,
        _growth(_time(GROWTH_FROM, "median_ms"), _time(GROWTH_TO, "median_ms")),
    ),
]
