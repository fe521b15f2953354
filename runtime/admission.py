"""A bound on how many requests wait at once."""

from __future__ import annotations

import threading

from runtime.errors import ClosedError, QueueFullError


class Admission:
    """How many requests may wait, counted over all the batchers that share it.

    Args:
        limit: requests that may wait at once, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return self._waiting

    def enter(self, *, block: bool) -> None:
        """Counts one request more.

        Args:
            block: wait for a place where there is none.

        Raises:
            QueueFullError: there is no place, and `block` is false.
            ClosedError: closed, also while it waited.
        """
        with self._changed:
            while self._waiting >= self.limit and not self._closed:
                if not block:
                    self._refuse()
                self._changed.wait()
            if self._closed:
                raise closed_error()
            self._waiting += 1

    def leave(self) -> None:
        """Counts one request less."""
        with self._changed:
            self._waiting -= 1
            self._changed.notify()

    def close(self) -> None:
        """Lets nobody in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _refuse(self) -> None:
        raise QueueFullError(
            "queue",
            got=f"{self._waiting} requests that wait already",
            wanted=f"fewer than max_queue, {self.limit}",
            remedy="try again later, send less at once, or allow a longer queue",
        )


def closed_error() -> ClosedError:
    """The error of a request that was not answered because what was asked is closed."""
    return ClosedError(
        "detector service",
        got="a request to a closed one",
        wanted="an open one",
        remedy="load it again; close it with drain=True for what waits to be answered first",
    )
