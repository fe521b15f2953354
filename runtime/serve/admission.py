"""Who is let in: as many pictures at once as keep the time that each takes within its bound.

By Little's law the pictures inside take, on average, their number times the seconds between two that leave. Both are
counted here, so the bound holds whatever the time goes into: decoding, batching or inference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.serve.request_errors import TOO_BUSY_REMEDY, RequestError

# Of a picture's time alone. Little's law is about the mean; the rest of twice that time is for its spread.
_STRETCH = 1.5
# So many are let in whatever was measured: one can be decoded while another is scored.
_ALWAYS_INSIDE = 1
# Weight of the newest picture in the running means: about the last twenty count.
_NEWEST = 0.05
# Share of the time between two pictures that each refusal takes off it. Where only one is let in, nothing is learnt of
# two at once, and a slow moment would count for ever; so one more is tried now and then, by few enough to spare the
# 99th percentile.
_FORGOTTEN = 3e-5


class LatencyAdmission:
    """Counts pictures in and out, and refuses those for which there is no time.

    Args:
        max_latency_s: bound of a picture's time; None means `_STRETCH` times that of a picture alone.
        clock: seconds, rising.

    Note:
        Thread safe.
    """

    def __init__(self, max_latency_s: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_latency_s = max_latency_s
        self._clock = clock
        self._lock = threading.Lock()
        self._inside = 0
        self._since = clock()  # the last one left, or the first one came
        self._entered = 0
        self._alone_s: float | None = None
        self._between_s: float | None = None

    @property
    def inside(self) -> int:
        """Pictures that were let in and are not done."""
        return self._inside

    @property
    def expected_latency_s(self) -> float:
        """Seconds that one more picture would take; 0 while nothing was measured."""
        return (self._inside + 1) * (self._between_s or 0.0)

    @property
    def bound_s(self) -> float | None:
        """Seconds that a picture may take; None while nothing was measured."""
        if self._max_latency_s is not None:
            return self._max_latency_s
        return None if self._alone_s is None else _STRETCH * self._alone_s

    def check(self) -> None:
        """Nothing where one more request would be let in now; one that finds nobody inside always is.

        Raises:
            RequestError: 429, with the seconds after which there should be room.
        """
        bound = self.bound_s
        if self._inside == 0 or bound is None or self.expected_latency_s <= bound:
            return
        error = RequestError(
            "server",
            got=f"{self._inside} pictures before this one, {1000 * self.expected_latency_s:.0f} ms in all",
            wanted=f"at most {1000 * bound:.0f} ms",
            remedy=TOO_BUSY_REMEDY,
            status=429,
            code="too_busy",
            retry_after_s=self.expected_latency_s - bound,
        )
        self._between_s = (1 - _FORGOTTEN) * (self._between_s or 0.0)
        raise error

    @contextmanager
    def admitted(self, pictures: int) -> Iterator[None]:
        """Context in which the pictures of one request are inside.

        Raises:
            RequestError: 429, as for `check`. Only what is ahead counts, so that a request is never too large.
        """
        with self._lock:
            self.check()
            alone = self._inside == 0 and pictures == 1
            self._enter(pictures)
            started, entered = self._clock(), self._entered
        try:
            yield
        except BaseException:
            # What was given up early says nothing of how long the others take.
            with self._lock:
                self._leave(pictures)
            raise
        with self._lock:
            now = self._clock()
            self._count_departure(pictures, now)
            self._leave(pictures)
            # Whoever came in meanwhile has taken some of its time.
            if alone and entered == self._entered:
                self._alone_s = _mean(self._alone_s, now - started)

    def _enter(self, pictures: int) -> None:
        if self._inside == 0:
            self._since = self._clock()
        self._inside += pictures
        self._entered += pictures

    def _count_departure(self, pictures: int, now: float) -> None:
        # A lone picture says how long one takes, not how many can be done in that time.
        if self._inside > 1:
            for _ in range(pictures):
                self._between_s = _mean(self._between_s, (now - self._since) / pictures)
        self._since = now

    def _leave(self, pictures: int) -> None:
        self._inside -= pictures


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST) * old + _NEWEST * new
