"""Dynamic batching: requests of many threads, made ready side by side and then worked on together.

A request passes through three hands: `submit` queues it, one of some preparing threads makes it ready (it decodes a
picture, say), and the one engine thread takes what is ready and works on it at once. What was cancelled, or is late,
leaves the queues at once and never reaches the engine.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from runtime.admission import Admission, closed_error
from runtime.errors import DeadlineError, UsageError

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")

_NEVER = float("inf")


class BatchObserver(Protocol):
    """Whoever wants to know about each batch, for metrics."""

    def batch(self, size: int, wait_s: list[float], infer_s: float) -> None:
        """Called after each batch, in the engine's thread, before its results are handed out.

        Args:
            size: requests in the batch.
            wait_s: seconds from `submit` to the start of the batch, for each request.
            infer_s: seconds that the engine took.
        """


@dataclass(frozen=True)
class Answered(Generic[Result]):
    """What `prepare` returns for a request whose result is known without the engine."""

    result: Result


@dataclass(eq=False)
class _Request(Generic[Item, Ready, Result]):
    """One item on its way, with times of `time.monotonic`; it `waits` as long as the admission counts it."""

    item: Item | None
    future: Future[Result]
    submitted_s: float
    deadline_s: float
    ready: Ready | None = None
    ready_s: float = _NEVER
    waits: bool = True
    ended: bool = False


class DynamicBatcher(Generic[Item, Ready, Result]):
    """A queue in front of an engine that is faster with many requests at once; closed by `close`.

    Args:
        prepare: makes one item ready; called from several threads at once. It may return `Answered`.
        infer: results of some ready items, in their order; called from one thread.
        admission: counts the requests that wait.
        max_batch_size: ready items given to `infer` at most.
        max_wait_ms: how long a ready item waits for others while the engine is free.
        prepare_threads: how many items are made ready side by side.
        observer: told of each batch.

    Note:
        Every method may be called from every thread, also from a callback of a future, except `close`, which waits
        for the threads that run those callbacks.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Ready | Answered[Result]],
        infer: Callable[[list[Ready]], Sequence[Result]],
        *,
        admission: Admission,
        max_batch_size: int,
        max_wait_ms: float,
        prepare_threads: int,
        observer: BatchObserver | None = None,
    ) -> None:
        self._prepare = prepare
        self._infer = infer
        self._admission = admission
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_ms / 1000
        self._observer = observer
        # One lock for all of it; methods that hold it call others that take it.
        self._lock = threading.RLock()
        self._item_arrived = threading.Condition(self._lock)
        self._ready_changed = threading.Condition(self._lock)
        self._timed_changed = threading.Condition(self._lock)
        self._incoming: OrderedDict[_Request[Item, Ready, Result], None] = OrderedDict()
        self._preparing: set[_Request[Item, Ready, Result]] = set()
        self._ready: OrderedDict[_Request[Item, Ready, Result], None] = OrderedDict()
        self._timed: set[_Request[Item, Ready, Result]] = set()
        self._first_deadline_s = _NEVER
        self._closed = False
        self._threads = [
            *(self._thread(self._prepare_all, f"ntf-prepare-{index}") for index in range(prepare_threads)),
            self._thread(self._infer_all, "ntf-infer"),
            self._thread(self._end_late_ones, "ntf-deadline"),
        ]
        for thread in self._threads:
            thread.start()
        # A program that forgot to close must end all the same, and no thread may run while its interpreter ends.
        atexit.register(self._close_at_exit)

    def submit(self, item: Item, *, timeout_s: float | None = None, block: bool = False) -> Future[Result]:
        """Future of the result for one item.

        Args:
            item: given to `prepare`.
            timeout_s: seconds from now after which the future raises DeadlineError; None waits for ever.
            block: wait for a place in the queue where there is none.

        Raises:
            QueueFullError: the queue is full, and `block` is false.
            ClosedError: the batcher is closed.
        """
        now = time.monotonic()
        self._admission.enter(block=block)
        request = _Request[Item, Ready, Result](item, Future(), now, _NEVER if timeout_s is None else now + timeout_s)
        with self._lock:
            if self._closed:
                self._leave(request)
                raise closed_error()
            self._incoming[request] = None
            self._item_arrived.notify()
            if timeout_s is not None:
                self._timed.add(request)
                if request.deadline_s < self._first_deadline_s:
                    self._timed_changed.notify()
        request.future.add_done_callback(lambda _: self._forget(request))
        return request.future

    def close(self, *, drain: bool) -> None:
        """Ends the threads; may be called twice.

        Args:
            drain: answer what waits first; otherwise it gets a ClosedError. The batch that the engine works on is
                always answered.

        Raises:
            UsageError: called from a callback of a future, in a thread of the batcher.
        """
        self.require_other_thread("close")
        self._begin_close(drain=drain)
        for thread in self._threads:
            thread.join()
        atexit.unregister(self._close_at_exit)

    def require_other_thread(self, action: str) -> None:
        """Nothing in a thread of the caller's; an error in one of the batcher's, which must not wait for its own end.

        Args:
            action: what the caller is about to do.

        Raises:
            UsageError: called from a callback of a future.
        """
        if threading.current_thread() in self._threads:
            raise UsageError(
                action,
                got="a call from a callback of a future",
                wanted="a call from a thread that does not work for the queue",
                remedy="make the callback tell another thread to do it",
            )

    def _begin_close(self, *, drain: bool) -> None:
        with self._lock:
            self._closed = True
            self._notify_all()
            waiting = [] if drain else [*self._incoming, *self._preparing, *self._ready]
        for request in waiting:
            self._fail(request, closed_error())

    def _close_at_exit(self) -> None:
        self.close(drain=False)

    def _notify_all(self) -> None:
        for condition in (self._item_arrived, self._ready_changed, self._timed_changed):
            condition.notify_all()

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        return threading.Thread(target=work, name=name, daemon=True)

    def _prepare_all(self) -> None:
        while (taken := self._next_item()) is not None:
            request, item = taken
            try:
                ready = self._prepare(item)
            except BaseException as error:  # whatever it was, it belongs to whoever holds the future
                self._fail(request, error)
            else:
                if isinstance(ready, Answered):
                    self._answer(request, ready.result)
                else:
                    self._set_ready(request, ready)
            with self._lock:
                self._preparing.discard(request)
                self._ready_changed.notify()

    def _next_item(self) -> tuple[_Request[Item, Ready, Result], Item] | None:
        """The oldest item that came in, waited for; None when there will be no more."""
        with self._lock:
            # What is ready may be larger than the item; two batches keep the engine busy.
            while not self._incoming or len(self._ready) >= 2 * self._max_batch_size:
                if self._closed and not self._incoming:
                    return None
                self._item_arrived.wait()
            request, _ = self._incoming.popitem(last=False)
            self._preparing.add(request)
            assert request.item is not None
            return request, request.item

    def _set_ready(self, request: _Request[Item, Ready, Result], ready: Ready) -> None:
        with self._lock:
            if not request.ended:
                request.ready, request.ready_s, request.item = ready, time.monotonic(), None
                self._ready[request] = None

    def _infer_all(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._work_on(batch)

    def _next_batch(self) -> list[tuple[_Request[Item, Ready, Result], Ready]] | None:
        """What the engine works on next, waited for and claimed; None when there will be no more."""
        with self._lock:
            while not self._batch_is_due():
                if self._closed and not (self._incoming or self._preparing or self._ready):
                    return None
                self._ready_changed.wait(self._collecting_s())
            self._item_arrived.notify_all()
            oldest = [self._ready.popitem(last=False)[0] for _ in range(min(len(self._ready), self._max_batch_size))]
            return [claimed for request in oldest if (claimed := self._claim(request)) is not None]

    def _batch_is_due(self) -> bool:
        if len(self._ready) >= self._max_batch_size:
            return True
        return bool(self._ready) and (self._closed or self._collecting_s() == 0)

    def _collecting_s(self) -> float | None:
        """Seconds that the oldest ready request still waits for others; None where there is none."""
        if not self._ready:
            return None
        return max(0.0, next(iter(self._ready)).ready_s + self._max_wait_s - time.monotonic())

    def _claim(self, request: _Request[Item, Ready, Result]) -> tuple[_Request[Item, Ready, Result], Ready] | None:
        """The request with what was made ready for it, from now on not to be cancelled; None for a dead one."""
        if request.deadline_s <= time.monotonic():
            return None  # the thread that watches deadlines is about to end it
        if not request.future.set_running_or_notify_cancel():
            self._end(request)
            return None
        self._leave(request)
        assert request.ready is not None
        return request, request.ready

    def _work_on(self, batch: list[tuple[_Request[Item, Ready, Result], Ready]]) -> None:
        began_s = time.monotonic()
        try:
            results = self._infer([ready for _, ready in batch])
            answers = [(request, result) for (request, _), result in zip(batch, results, strict=True)]
        except BaseException as error:  # whatever it was, it belongs to whoever holds the futures
            for request, _ in batch:
                self._fail(request, error)
            return
        self._observe([began_s - request.submitted_s for request, _ in batch], time.monotonic() - began_s)
        for request, result in answers:
            self._answer(request, result)

    def _observe(self, wait_s: list[float], infer_s: float) -> None:
        if self._observer is None:
            return
        try:
            self._observer.batch(len(wait_s), wait_s, infer_s)
        except Exception:  # a broken metric must not cost a result
            logging.getLogger(__name__).exception("the observer of batches failed")

    def _end_late_ones(self) -> None:
        while (late := self._next_late_ones()) is not None:
            for request in late:
                self._fail(request, _deadline_error(request.deadline_s - request.submitted_s))

    def _next_late_ones(self) -> list[_Request[Item, Ready, Result]] | None:
        """Requests whose time has passed, waited for; None when there will be no more."""
        with self._lock:
            while True:
                now = time.monotonic()
                late = [request for request in self._timed if request.deadline_s <= now]
                if late:
                    return late
                if self._closed and not self._timed:
                    return None
                self._first_deadline_s = min((request.deadline_s for request in self._timed), default=_NEVER)
                self._timed_changed.wait(min(self._first_deadline_s - now, threading.TIMEOUT_MAX))

    def _answer(self, request: _Request[Item, Ready, Result], result: Result) -> None:
        if self._may_settle(request):
            request.future.set_result(result)

    def _fail(self, request: _Request[Item, Ready, Result], error: BaseException) -> None:
        if self._may_settle(request):
            request.future.set_exception(error)

    def _may_settle(self, request: _Request[Item, Ready, Result]) -> bool:
        """Whether the caller is the one who gives this request its end; it is then not to be cancelled any more."""
        future = request.future
        return self._end(request) and (future.running() or future.set_running_or_notify_cancel())

    def _forget(self, request: _Request[Item, Ready, Result]) -> None:
        """After the end of a future: takes a cancelled request out of the queues."""
        if self._end(request):
            # Only a future that says so is done for `concurrent.futures.wait`.
            request.future.set_running_or_notify_cancel()

    def _end(self, request: _Request[Item, Ready, Result]) -> bool:
        """Takes a request out of everything; true for the first caller."""
        with self._lock:
            if request.ended:
                return False
            request.ended = True
            self._incoming.pop(request, None)
            self._ready.pop(request, None)
            self._timed.discard(request)
            self._leave(request)
            request.item = request.ready = None
            self._item_arrived.notify_all()  # there may be room for what is ready
            if self._closed:
                self._notify_all()
            return True

    def _leave(self, request: _Request[Item, Ready, Result]) -> None:
        if request.waits:
            request.waits = False
            self._admission.leave()


def _deadline_error(allowed_s: float) -> DeadlineError:
    return DeadlineError(
        "request",
        got=f"no answer within {allowed_s:g} s",
        wanted="an answer by then",
        remedy="allow more time, send less at once, or use a faster back-end",
    )
