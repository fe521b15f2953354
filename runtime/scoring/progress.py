"""What is shown while a collection is scored: how far, how fast, how much longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

# On a terminal one line is written over itself; a log gets a line now and then.
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    """Counts rows and writes a line about them.

    Args:
        total: pictures of the collection.
        before: of them, scored by earlier runs; they do not count for the rate.
        stream: where to write.
        clock: seconds that never go back.
    """

    def __init__(self, total: int, before: int, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._stream, self._clock = total, before, stream, clock
        self._started = self._written = clock()
        self._scored = self._failed = 0
        self._terminal = stream.isatty()

    def advance(self, scored: int, failed: int) -> None:
        """Counts rows, and writes a line when it is time to.

        Args:
            scored: rows more, failed ones among them.
            failed: rows with an error.
        """
        self._scored += scored
        self._failed += failed
        if self._clock() - self._written >= (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            self._write()

    def close(self) -> None:
        """Writes where things stand, and ends the line."""
        self._write()
        if self._terminal:
            self._stream.write("\n")

    def line(self) -> str:
        """For example "1,200 of 5,000 (24 %), 310 a second, 12 s left, 3 failed"."""
        done = self._before + self._scored
        seconds = self._clock() - self._started
        parts = [f"{done:,} of {self._total:,} ({100 * done // max(1, self._total)} %)"]
        if self._scored and seconds > 0:
            rate = self._scored / seconds
            parts.append(f"{rate:,.3g} a second" if rate < 1000 else f"{rate:,.0f} a second")
            if done < self._total:
                parts.append(f"{duration((self._total - done) / rate)} left")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        return ", ".join(parts)

    def _write(self) -> None:
        self._written = self._clock()
        # The escape sequence clears what a longer line left behind.
        self._stream.write(f"\r{self.line()}\x1b[K" if self._terminal else f"{self.line()}\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """A time for people: "42 s", "12 min", "3 h 20 min", "5 d 3 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
