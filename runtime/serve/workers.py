"""Threads for what clients send: the event loop, and with it /healthz, goes on while a body is taken apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from runtime.errors import DeadlineError

_T = TypeVar("_T")

# So much is taken apart in about a millisecond, less than the way to a thread and back is worth.
_AT_ONCE_BYTES = 1 << 16
# A body that is taken apart may need many times its memory, so there are few.
_THREADS = 4


class Workers:
    """A few threads; ended by `close`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "ntf-request")

    async def run(self, function: Callable[[], _T], *, timeout_s: float, size_bytes: int | None = None) -> _T:
        """The result of a function that is called in a thread.

        Args:
            function: it must come to an end by itself: nothing can end a thread.
            timeout_s: seconds from now, the wait for a thread included.
            size_bytes: of what it takes apart; little is taken apart at once, without a thread.

        Raises:
            DeadlineError: that passed; a function that was not begun is not called.
        """
        if size_bytes is not None and size_bytes <= _AT_ONCE_BYTES:
            return function()
        running = asyncio.get_running_loop().run_in_executor(self._pool, function)
        try:
            return await asyncio.wait_for(running, timeout_s)
        except asyncio.TimeoutError:
            raise deadline_error() from None

    def close(self) -> None:
        """Begins nothing any more; what was begun ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def deadline_error() -> DeadlineError:
    """What a request is told that has no time left."""
    return DeadlineError(
        "request", got="no time left", wanted="an answer by then", remedy="send fewer pictures at once"
    )
