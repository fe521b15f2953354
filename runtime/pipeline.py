"""Work on a stream in two steps at once: while a thread finishes one batch, the next ones are started."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Started = TypeVar("Started")
Result = TypeVar("Result")

# Started and not yet handed out: one batch that is being finished, one that comes next, and one that is done while
# whoever takes the results is busy with the batch before.
BATCHES_AHEAD = 3


def pipelined(
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[list[Started]], list[Result]],
    *,
    batch_size: int,
) -> Iterator[Result]:
    """Results in the order of the items, which are taken as results are taken: at most `BATCHES_AHEAD` batches ahead.

    Where taking an item fails, the results of all items before it come first, then the error.

    Args:
        items: any iterable; it is advanced in the caller's thread alone.
        start: called for each item in the caller's thread; it should begin the work and not wait for it.
        finish: results of up to batch_size started items, in their order; called in a thread of its own, one batch
            at a time.
        batch_size: items finished at once.
    """
    errors: list[Exception] = []
    started = map(start, _until_error(items, errors))
    batches = iter(lambda: list(islice(started, batch_size)), [])
    yield from _finished(batches, finish, batch_size)
    if errors:
        raise errors[0]


def _finished(
    batches: Iterator[list[Started]], finish: Callable[[list[Started]], list[Result]], batch_size: int
) -> Iterator[Result]:
    pending: deque[Future[list[Result]]] = deque()
    worker = ThreadPoolExecutor(1, "ntf-stream")
    try:
        for batch in batches:
            if len(batch) < batch_size and not pending:
                yield from finish(batch)  # the only batch, or the last: there is nothing to do meanwhile
                break
            pending.append(worker.submit(finish, batch))
            while pending and (pending[0].done() or len(pending) >= BATCHES_AHEAD):
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)


def _until_error(items: Iterable[Item], errors: list[Exception]) -> Iterator[Item]:
    """The items up to an error in taking one, which is put into `errors`."""
    try:
        yield from items
    except Exception as error:
        errors.append(error)
