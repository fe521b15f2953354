"""How long a batch takes: the bare graph, with the copies in front of it, and from encoded pictures to verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend
from runtime.detector import Detector

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = 4.0
WARM_UP_SHARE = 0.25
# Of fewer calls neither a median nor a spread says much.
FEWEST_CALLS = 5
GRAPH, COPIES, END_TO_END = "graph", "copies", "end to end"
STAGES = {
    GRAPH: "the graph on one contiguous array; a back-end on a GPU copies to the device and back in it",
    COPIES: "single pictures copied into that array, then the graph",
    END_TO_END: "encoded pictures in memory: decoded, cropped, copied, the graph, verdicts",
}


@dataclass(frozen=True)
class Latency:
    """Times of one stage for one batch size.

    Attributes:
        precision: of the graph.
        backend: that ran it.
        stage: key of STAGES.
        batch: pictures at once.
        calls: that were timed, after the warm-up.
        p50_ms: median of a call.
        p90_ms: None, as in the two that follow, where there were too few calls for one to lie above it.
        p95_ms: see p90_ms.
        p99_ms: see p90_ms.
        spread_ms: half the interquartile range.
        pictures_per_second: batch over median.
    """

    precision: str
    backend: str
    stage: str
    batch: int
    calls: int
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    spread_ms: float
    pictures_per_second: float


@dataclass(frozen=True)
class LeftOut:
    """A batch size that was not timed, and why."""

    precision: str
    backend: str
    stage: str
    batch: int
    reason: str


@dataclass(frozen=True)
class LatencySweep:
    """Every batch size of every stage: timed, or left out with the reason."""

    measured: tuple[Latency, ...]
    left_out: tuple[LeftOut, ...]


def measure_latency(
    backend: Backend,
    detector: Detector,
    images: NDArray[np.uint8],
    files: Sequence[bytes],
    *,
    precision: str,
    seconds: float = SECONDS,
    batches: Sequence[int] = BATCHES,
) -> LatencySweep:
    """Times of all stages of one precision on one back-end.

    Args:
        backend: the graph, opened.
        detector: the same precision on the same back-end.
        images: (N, H, W, 3) prepared pictures, N at least the largest batch.
        files: N encoded pictures.
        precision: of the graph.
        seconds: for each stage and batch size, WARM_UP_SHARE of it for the warm-up; a batch size of which FEWEST_CALLS
            do not fit into the rest is left out, and those above it.
        batches: batch sizes, rising.
    """
    singles = [np.ascontiguousarray(image) for image in images]
    stages: dict[str, Callable[[int], object]] = {
        GRAPH: lambda batch: backend.infer(images[:batch]),
        COPIES: lambda batch: backend.infer(np.stack(singles[:batch])),
        END_TO_END: lambda batch: detector.predict(files[:batch], batch_size=batch),
    }
    measured: list[Latency] = []
    left_out: list[LeftOut] = []
    for stage, call in stages.items():
        for batch in batches:
            times, call_seconds = time_calls(partial(call, batch), seconds=seconds)
            if not len(times):
                reason = f"{FEWEST_CALLS} calls of {call_seconds:.2g} s at batch {batch} do not fit into {seconds:g} s"
                left_out += [LeftOut(precision, backend.name, stage, b, reason) for b in batches if b >= batch]
                break
            measured.append(latency_of(times, precision=precision, backend=backend.name, stage=stage, batch=batch))
    return LatencySweep(tuple(measured), tuple(left_out))


def joined_sweeps(sweeps: Iterable[LatencySweep]) -> LatencySweep:
    """Several sweeps as one."""
    parts = list(sweeps)
    measured = tuple(latency for part in parts for latency in part.measured)
    return LatencySweep(measured, tuple(left for part in parts for left in part.left_out))


def time_calls(
    call: Callable[[], object], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[NDArray[np.float64], float]:
    """Seconds of each timed call, and of the last call of the warm-up.

    The warm-up goes by time, since a number of calls that warms up one batch size is too few for another, and has two
    calls at least, since the first one says nothing of those that follow. There are no times where FEWEST_CALLS do not
    fit into the rest.

    Args:
        call: what is timed.
        seconds: for warm-up and timed calls together.
        clock: in seconds.
    """
    warm_up = _call_for(call, WARM_UP_SHARE * seconds, fewest=2, clock=clock)
    rest = (1 - WARM_UP_SHARE) * seconds
    if FEWEST_CALLS * warm_up[-1] > rest:
        return np.empty(0), warm_up[-1]
    return np.array(_call_for(call, rest, fewest=FEWEST_CALLS, clock=clock)), warm_up[-1]


def _call_for(call: Callable[[], object], seconds: float, *, fewest: int, clock: Callable[[], float]) -> list[float]:
    times: list[float] = []
    start = now = clock()
    while len(times) < fewest or now - start < seconds:
        call()
        before, now = now, clock()
        times.append(now - before)
    return times


def latency_of(times: NDArray[np.float64], *, precision: str, backend: str, stage: str, batch: int) -> Latency:
    """Percentiles of the seconds (N,) of the calls of one batch size."""
    milliseconds = 1000.0 * times
    lower, median, upper = (float(value) for value in np.percentile(milliseconds, (25, 50, 75)))
    return Latency(
        precision=precision,
        backend=backend,
        stage=stage,
        batch=batch,
        calls=len(times),
        p50_ms=median,
        p90_ms=_percentile(milliseconds, 90),
        p95_ms=_percentile(milliseconds, 95),
        p99_ms=_percentile(milliseconds, 99),
        spread_ms=(upper - lower) / 2,
        pictures_per_second=1000.0 * batch / median,
    )


def _percentile(values: NDArray[np.float64], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if len(values) * (100 - percent) >= 100 else None
