"""Time the contenders of one row in turn: A B C, A B C, ... with a matrix product beside them.

On a machine that others share, two medians of two separate runs say little about each other. Here every round runs
all contenders one after the other, a ratio is taken within each round, and the median over rounds is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_contenders import (
    DTYPES,
    TOLERANCES,
    Batch,
    Contest,
    Loss,
    check_agreement,
    expected,
    matmul_precision,
    value_and_gradient,
)

MATMUL_SIDE = 4096
MATMUL_OPERATIONS = 2.0 * MATMUL_SIDE**3
DIRECTIONS = ("forward", "backward", "both")
# The product takes longer than all contenders of a small row together, so it runs this often in a row at most.
MATMULS_A_ROW = 5

# A mark on the device's clock, and the seconds between two.
Mark = Any


@dataclass(frozen=True)
class Clock:
    """How time is told on a device.

    Attributes:
        mark: remember now, without waiting for the device.
        seconds: between two marks, once the device has passed both.
        settle: wait until the device has nothing left to do.
    """

    mark: Callable[[], Mark]
    seconds: Callable[[Mark, Mark], float]
    settle: Callable[[], None]


def clock_of(device: str) -> Clock:
    """`time.perf_counter` on a CPU, CUDA events on a GPU."""
    if device == "cpu":
        return Clock(time.perf_counter, lambda start, end: end - start, lambda: None)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return Clock(mark, seconds, torch.cuda.synchronize)


@dataclass(frozen=True)
class Row:
    """One contender in one direction at one size, as it stands in the results file.

    Attributes:
        contest: name of the contest.
        contender: its name.
        n: rows of the batch.
        precision: of inputs and products.
        direction: "forward", "backward", or "both", which is their sum in the same call.
        threads: that PyTorch used on the CPU.
        rounds: how often it was timed.
        median_ms: of all rounds.
        iqr_ms: interquartile range of all rounds.
        times_faster: median over rounds of baseline / contender; None where the baseline did not take part.
        times_faster_quartiles: lower and upper quartile of the same ratios.
        matmul_share: median over rounds of counted operations a second, divided by those of the matrix product.
        matmul_gflops: median rate of the matrix product beside this row.
    """

    contest: str
    contender: str
    n: int
    precision: str
    direction: str
    threads: int
    rounds: int
    median_ms: float
    iqr_ms: float
    times_faster: float | None
    times_faster_quartiles: tuple[float, float] | None
    matmul_share: float
    matmul_gflops: float


@dataclass
class Race:
    """The contenders of one size and precision, and what was timed so far.

    Attributes:
        contest: whose contenders run.
        n: rows of the batch.
        precision: of inputs and products.
        device: "cpu" or "cuda".
        clock: how time is told.
        seconds: for each contender, (forward, backward) of each round.
        matmul_seconds: for each round, of the latest matrix product.
    """

    contest: Contest
    n: int
    precision: str
    device: str
    clock: Clock
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    matmul_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._runners = self.contest.runners(self.n)
        self._batch = self.contest.batch(self.n, dtype=DTYPES[self.precision], device=self.device)
        self._factor = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=self.device).to(DTYPES[self.precision])

    def check(self) -> None:
        """Run every contender once, untimed, and compare it with the oracle.

        Raises:
            LossBenchmarkError: a result is wrong.
        """
        wanted = expected(self.contest, self._batch)
        with matmul_precision(self.precision):
            for name, loss in self._runners.items():
                got = value_and_gradient(loss, self._batch)
                check_agreement(f"{name} with N = {self.n}", got, wanted, TOLERANCES[self.precision])

    def run(self, rounds: int) -> Callable[[], None]:
        """What runs one of so many rounds."""
        every = -(-rounds // MATMULS_A_ROW)

        def one_round() -> None:
            with matmul_precision(self.precision):
                if len(self.matmul_seconds) % every == 0:
                    latest = _matmul_seconds(self._factor, self.clock)
                else:
                    latest = self.matmul_seconds[-1]
                self.matmul_seconds.append(latest)
                for name, loss in self._runners.items():
                    self.seconds.setdefault(name, []).append(_pass_seconds(loss, self._batch, self.clock))

        return one_round

    def rows(self) -> list[dict[str, Any]]:
        """The three directions of each contender."""
        directions = {name: _by_direction(seconds) for name, seconds in self.seconds.items()}
        operations = self.contest.counted_operations(self.n)
        base = directions.get(self.contest.baseline)
        return [
            asdict(self._row(name, direction, seconds[direction], base, operations[direction]))
            for name, seconds in directions.items()
            for direction in DIRECTIONS
        ]

    def _row(
        self,
        name: str,
        direction: str,
        seconds: list[float],
        base: Mapping[str, list[float]] | None,
        operations: float,
    ) -> Row:
        ratios = [b / s for b, s in zip(base[direction], seconds, strict=True)] if base else None
        shares = [(operations / s) / (MATMUL_OPERATIONS / m) for s, m in zip(seconds, self.matmul_seconds, strict=True)]
        low, high = _quartiles(seconds)
        return Row(
            contest=self.contest.name,
            contender=name,
            n=self.n,
            precision=self.precision,
            direction=direction,
            threads=torch.get_num_threads(),
            rounds=len(seconds),
            median_ms=_rounded(statistics.median(seconds) * 1e3),
            iqr_ms=_rounded((high - low) * 1e3),
            times_faster=_rounded(statistics.median(ratios)) if ratios else None,
            times_faster_quartiles=tuple(map(_rounded, _quartiles(ratios))) if ratios else None,
            matmul_share=_rounded(statistics.median(shares)),
            matmul_gflops=_rounded(MATMUL_OPERATIONS / statistics.median(self.matmul_seconds) / 1e9),
        )


def _pass_seconds(loss: Loss, batch: Batch, clock: Clock) -> tuple[float, float]:
    clock.settle()
    start = clock.mark()
    value = loss(batch)
    middle = clock.mark()
    torch.autograd.grad(value, batch.embeddings)
    end = clock.mark()
    return clock.seconds(start, middle), clock.seconds(middle, end)


def _matmul_seconds(factor: Tensor, clock: Clock) -> float:
    clock.settle()
    start = clock.mark()
    torch.mm(factor, factor)
    return clock.seconds(start, clock.mark())


def _by_direction(seconds: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {
        "forward": [forward for forward, _ in seconds],
        "backward": [backward for _, backward in seconds],
        "both": [forward + backward for forward, backward in seconds],
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _rounded(value: float) -> float:
    """Four significant digits: more would only look exact."""
    return float(f"{value:.4g}")
