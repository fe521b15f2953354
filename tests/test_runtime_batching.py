from __future__ import annotations

import concurrent.futures
import logging
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.admission import Admission
from runtime.batching import Answered, DynamicBatcher
from runtime.errors import ClosedError, DeadlineError, QueueFullError, UsageError

ROOT = Path(__file__).parents[1]
# Long enough for a loaded machine: reached only by a test that fails.
PATIENCE_S = 30


class GatedEngine:
    """An engine that gives ten times each number, one batch each time the gate is opened."""

    def __init__(self):
        self.batches = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        return [10 * number for number in numbers]

    def await_batch(self):
        assert self.entered.acquire(timeout=PATIENCE_S)

    def open(self, batches=1000):
        self.gate.release(batches)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.seen = []

    def batch(self, size, wait_s, infer_s):
        self.seen.append((size, wait_s, infer_s))


@contextmanager
def batcher_of(infer, *, prepare=lambda number: number, limit=100, admission=None, **options):
    settings = {"max_batch_size": 4, "max_wait_ms": 0, "prepare_threads": 2} | options
    batcher = DynamicBatcher(prepare, infer, admission=admission or Admission(limit), **settings)
    try:
        yield batcher
    finally:
        if isinstance(infer, GatedEngine):
            infer.open()
        batcher.close(drain=False)


@contextmanager
def busy_batcher(**options):
    """A batcher whose engine works on request 0 until the gate is opened: (batcher, engine, future of request 0)."""
    engine = GatedEngine()
    with batcher_of(engine, **options) as batcher:
        future = batcher.submit(0)
        engine.await_batch()
        yield batcher, engine, future


def eventually(condition):
    """Waits until a condition holds."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.001)


def test_each_request_gets_its_own_result():
    with batcher_of(lambda numbers: [10 * number for number in numbers]) as batcher:
        futures = [batcher.submit(number) for number in range(50)]
        assert [future.result(PATIENCE_S) for future in futures] == [10 * number for number in range(50)]


def test_requests_collect_while_the_engine_is_busy_up_to_the_largest_batch():
    with busy_batcher() as (batcher, engine, first):
        others = [batcher.submit(number) for number in range(1, 7)]
        eventually(lambda: len(batcher._ready) == 6)
        engine.open()
        assert [future.result(PATIENCE_S) for future in [first, *others]] == [10 * number for number in range(7)]
    assert [len(batch) for batch in engine.batches] == [1, 4, 2]


def test_full_batch_goes_out_at_once_and_a_lone_request_after_its_wait():
    engine = GatedEngine()
    engine.open()
    with batcher_of(engine, max_batch_size=3, max_wait_ms=3_600_000) as batcher:
        futures = [batcher.submit(number) for number in range(3)]
        assert [future.result(PATIENCE_S) for future in futures] == [0, 10, 20]
    with batcher_of(engine, max_batch_size=3, max_wait_ms=5) as batcher:
        assert batcher.submit(7).result(PATIENCE_S) == 70
    assert [sorted(batch) for batch in engine.batches] == [[0, 1, 2], [7]]


def test_request_waits_for_others_while_the_engine_is_free():
    engine = GatedEngine()
    engine.open()
    with batcher_of(engine, max_batch_size=2, max_wait_ms=3_600_000) as batcher:
        first = batcher.submit(1)
        eventually(lambda: len(batcher._ready) == 1)
        assert not first.done()
        assert batcher.submit(2).result(PATIENCE_S) == 20
        assert first.result(PATIENCE_S) == 10
    assert engine.batches == [[1, 2]]


def test_full_queue_refuses_at_once_and_has_a_place_again_when_the_engine_took_some():
    with busy_batcher(limit=3) as (batcher, engine, _):
        futures = [batcher.submit(number) for number in (1, 2, 3)]
        with pytest.raises(
            QueueFullError, match=r"queue: got 3 requests that wait already, wanted fewer than max_queue, 3: try again"
        ):
            batcher.submit(4)
        engine.open()
        concurrent.futures.wait(futures, PATIENCE_S)
        assert batcher.submit(5).result(PATIENCE_S) == 50
    assert 4 not in [number for batch in engine.batches for number in batch]


def test_blocking_submit_waits_for_a_place():
    with busy_batcher(limit=1) as (batcher, engine, _), concurrent.futures.ThreadPoolExecutor(1) as other:
        batcher.submit(1)
        second = other.submit(lambda: batcher.submit(2, block=True))
        with pytest.raises(concurrent.futures.TimeoutError):
            second.result(0.05)
        engine.open()
        assert second.result(PATIENCE_S).result(PATIENCE_S) == 20


def test_cancelled_request_never_reaches_the_engine_and_gives_its_place_back():
    admission = Admission(3)
    with busy_batcher(admission=admission) as (batcher, engine, _):
        cancelled, kept = batcher.submit(1), batcher.submit(2)
        eventually(lambda: len(batcher._ready) == 2)
        assert admission.waiting == 2
        assert cancelled.cancel()
        assert admission.waiting == 1
        assert len(batcher._ready) == 1
        assert concurrent.futures.wait([cancelled], PATIENCE_S).done == {cancelled}
        engine.open()
        assert kept.result(PATIENCE_S) == 20
    assert engine.batches == [[0], [2]]


def test_request_that_is_cancelled_while_it_is_prepared_goes_no_further():
    started, go_on = threading.Event(), threading.Event()

    def prepare(number):
        if number == 1:
            started.set()
            assert go_on.wait(PATIENCE_S)
        return number

    engine = GatedEngine()
    engine.open()
    with batcher_of(engine, prepare=prepare, prepare_threads=1) as batcher:
        future = batcher.submit(1)
        assert started.wait(PATIENCE_S)
        assert future.cancel()
        go_on.set()
        assert batcher.submit(2).result(PATIENCE_S) == 20
    assert engine.batches == [[2]]


def test_request_that_the_engine_works_on_is_not_cancelled():
    with busy_batcher() as (_, engine, first):
        assert not first.cancel()
        engine.open()
        assert first.result(PATIENCE_S) == 0


def test_late_request_ends_in_time_and_never_reaches_the_engine():
    with busy_batcher() as (batcher, engine, first):
        late, patient = batcher.submit(1, timeout_s=0.01), batcher.submit(2, timeout_s=3600)
        with pytest.raises(DeadlineError, match=r"request: got no answer within 0\.01 s, wanted an answer by then"):
            late.result(PATIENCE_S)
        assert not first.done()
        engine.open()
        assert patient.result(PATIENCE_S) == 20
    assert engine.batches == [[0], [2]]


def test_request_whose_time_passes_as_the_engine_takes_it_is_left_out():
    with busy_batcher() as (batcher, engine, _):
        late, kept = batcher.submit(1, timeout_s=3600), batcher.submit(2)
        eventually(lambda: len(batcher._ready) == 2)
        with batcher._lock:  # before the thread that watches deadlines wakes up
            next(iter(batcher._timed)).deadline_s = time.monotonic()
        engine.open()
        assert kept.result(PATIENCE_S) == 20
        with batcher._lock:
            batcher._timed_changed.notify()
        with pytest.raises(DeadlineError):
            late.result(PATIENCE_S)
    assert engine.batches == [[0], [2]]


def test_shorter_deadline_that_comes_later_is_kept():
    with busy_batcher() as (batcher, _, _):
        patient = batcher.submit(1, timeout_s=3600)
        with pytest.raises(DeadlineError):
            batcher.submit(2, timeout_s=0.01).result(PATIENCE_S)
        assert not patient.done()


def test_deadline_that_passes_in_the_engine_is_kept_and_the_rest_of_the_batch_is_answered():
    engine = GatedEngine()
    with batcher_of(engine, max_batch_size=2, max_wait_ms=3_600_000) as batcher:
        late, other = batcher.submit(1, timeout_s=3600), batcher.submit(2)
        engine.await_batch()
        with batcher._lock:
            next(iter(batcher._timed)).deadline_s = time.monotonic()
            batcher._timed_changed.notify()
        with pytest.raises(DeadlineError):
            late.result(PATIENCE_S)
        assert not other.done()
        engine.open()
        assert other.result(PATIENCE_S) == 20


def test_error_of_the_engine_goes_to_its_batch_and_the_next_batch_works():
    def infer(numbers):
        if 1 in numbers:
            raise ZeroDivisionError("broken")
        return numbers

    with batcher_of(infer) as batcher:
        with pytest.raises(ZeroDivisionError, match="broken"):
            batcher.submit(1).result(PATIENCE_S)
        assert batcher.submit(2).result(PATIENCE_S) == 2


def test_engine_that_gives_too_few_results_gives_nobody_the_result_of_another():
    with batcher_of(lambda numbers: numbers[:-1]) as batcher, pytest.raises(ValueError, match="argument 2 is shorter"):
        batcher.submit(1).result(PATIENCE_S)


def test_error_while_preparing_belongs_to_that_request_alone():
    def prepare(number):
        return 1 // number

    with batcher_of(lambda numbers: numbers, prepare=prepare) as batcher:
        bad, good = batcher.submit(0), batcher.submit(1)
        with pytest.raises(ZeroDivisionError):
            bad.result(PATIENCE_S)
        assert good.result(PATIENCE_S) == 1


def test_request_that_is_answered_by_preparing_needs_no_engine():
    admission = Admission(2)
    with busy_batcher(admission=admission, prepare=lambda n: Answered("known") if n == 1 else n) as (
        batcher,
        engine,
        _,
    ):
        assert batcher.submit(1).result(PATIENCE_S) == "known"
        assert admission.waiting == 0
    assert engine.batches == [[0]]


def test_items_wait_unprepared_beyond_two_batches():
    prepared = []

    def prepare(number):
        prepared.append(number)
        return number

    with busy_batcher(prepare=prepare, prepare_threads=1) as (batcher, engine, _):
        futures = [batcher.submit(number) for number in range(1, 30)]
        eventually(lambda: len(batcher._ready) == 8)
        assert len(prepared) == 1 + 8
        assert futures[0].cancel()  # which leaves room for one more
        eventually(lambda: len(prepared) == 1 + 9)
        assert len(batcher._incoming) == 29 - 9
        engine.open()
        assert [future.result(PATIENCE_S) for future in futures[1:]] == [10 * number for number in range(2, 30)]


def test_close_answers_everything_that_waits():
    with busy_batcher(prepare_threads=1) as (batcher, engine, first):
        futures = [batcher.submit(number) for number in range(1, 10)]
        closing = threading.Thread(target=batcher.close, kwargs={"drain": True})
        closing.start()
        eventually(lambda: batcher._closed)
        engine.open()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert all(future.done() for future in [first, *futures])
        assert [future.result() for future in futures] == [10 * number for number in range(1, 10)]


def test_close_does_not_wait_for_others_to_fill_a_batch():
    with batcher_of(lambda numbers: numbers, max_wait_ms=3_600_000) as batcher:
        lone = batcher.submit(1)
        eventually(lambda: len(batcher._ready) == 1)
        closing = threading.Thread(target=batcher.close, kwargs={"drain": True}, daemon=True)
        closing.start()
        assert lone.result(PATIENCE_S) == 1
        closing.join(PATIENCE_S)
        assert not closing.is_alive()


def test_close_without_draining_ends_what_waits_with_an_error_and_what_is_worked_on_with_its_result():
    preparing, go_on = threading.Event(), threading.Event()

    def prepare(number):
        if number == 2:
            preparing.set()
            assert go_on.wait(PATIENCE_S)
        return number

    with busy_batcher(prepare=prepare, prepare_threads=1) as (batcher, engine, first):
        futures = [batcher.submit(number) for number in (1, 2, 3)]  # ready, being prepared, not yet begun
        assert preparing.wait(PATIENCE_S)
        closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
        closing.start()
        for future in futures:
            with pytest.raises(ClosedError, match="got a request to a closed one, wanted an open one"):
                future.result(PATIENCE_S)
        go_on.set()
        engine.open()
        closing.join(PATIENCE_S)
        assert first.result(PATIENCE_S) == 0
    assert engine.batches == [[0]]


def test_closed_batcher_refuses_and_its_threads_are_gone():
    with batcher_of(lambda numbers: numbers) as batcher:
        threads = batcher._threads
        assert all(thread.is_alive() for thread in threads)
        batcher.close(drain=True)
        batcher.close(drain=True)
        assert not any(thread.is_alive() for thread in threads)
        with pytest.raises(ClosedError):
            batcher.submit(1)
        assert batcher._admission.waiting == 0


def test_closed_admission_wakes_those_that_wait_for_a_place():
    admission = Admission(1)
    admission.enter(block=False)
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        waiting = other.submit(admission.enter, block=True)
        admission.close()
        with pytest.raises(ClosedError):
            waiting.result(PATIENCE_S)


def test_close_from_a_callback_is_refused_instead_of_waiting_for_itself():
    errors = []

    def close(_):
        try:
            batcher.close(drain=True)
        except UsageError as error:
            errors.append(error)

    with busy_batcher() as (batcher, engine, first):
        first.add_done_callback(close)
        engine.open()
        eventually(lambda: errors)
    assert "got a call from a callback of a future" in str(errors[0])


def test_callback_of_a_future_may_submit_again():
    again = []
    with busy_batcher() as (batcher, engine, first):
        first.add_done_callback(lambda _: again.append(batcher.submit(5)))
        engine.open()
        eventually(lambda: again)
        assert again[0].result(PATIENCE_S) == 50


def test_observer_is_told_of_each_batch_before_its_results_are_there():
    recorder = Recorder()
    with busy_batcher(observer=recorder) as (batcher, engine, first):
        others = [batcher.submit(number) for number in (1, 2)]
        submitted_s = time.monotonic()
        eventually(lambda: len(batcher._ready) == 2)
        opened_s = time.monotonic()
        engine.open(1)
        first.result(PATIENCE_S)
        assert [size for size, _, _ in recorder.seen] == [1]
        engine.open()
        concurrent.futures.wait(others, PATIENCE_S)
    (_, [first_wait_s], infer_s), (size, wait_s, _) = recorder.seen
    assert (size, len(wait_s)) == (2, 2)
    # The engine was at the first batch while the two waited.
    assert min(first_wait_s, *wait_s) >= 0
    assert min(infer_s, *wait_s) >= opened_s - submitted_s


def test_broken_observer_costs_no_result_and_is_logged(caplog):
    class Broken:
        def batch(self, size, wait_s, infer_s):
            raise ZeroDivisionError("metrics")

    with caplog.at_level(logging.ERROR), batcher_of(lambda numbers: numbers, observer=Broken()) as batcher:
        assert batcher.submit(1).result(PATIENCE_S) == 1
    assert "the observer of batches failed" in caplog.text
    assert "ZeroDivisionError: metrics" in caplog.text


def test_program_that_forgets_to_close_ends_when_its_engine_has_done_its_batch():
    code = (
        "import threading, time\n"
        "from runtime.admission import Admission\n"
        "from runtime.batching import DynamicBatcher\n"
        "working = threading.Event()\n"
        "def infer(numbers):\n"
        "    working.set()\n"
        "    time.sleep(0.2)\n"
        "    return numbers\n"
        "batcher = DynamicBatcher(lambda n: n, infer, admission=Admission(9), max_batch_size=4, max_wait_ms=0,"
        " prepare_threads=2)\n"
        "future = batcher.submit(7)\n"
        "future.add_done_callback(lambda future: print('answered', future.result()))\n"
        "working.wait()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "answered 7\n", "")


def test_every_request_of_many_threads_ends_exactly_once():
    admission = Admission(40)
    ended = []
    refused = []

    def client(seed):
        rng = random.Random(seed)
        for number in range(150):
            try:
                future = batcher.submit(number, timeout_s=rng.choice([None, 0.0005, 60]), block=rng.random() < 0.5)
            except QueueFullError:
                refused.append(number)
                continue
            future.add_done_callback(ended.append)
            submitted.append((number, future))
            if rng.random() < 0.3:
                future.cancel()

    submitted = []
    with batcher_of(lambda ns: [10 * n for n in ns], admission=admission, max_batch_size=7, max_wait_ms=0.2) as batcher:
        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        batcher.close(drain=True)
        assert not batcher._timed
    assert len(submitted) + len(refused) == 6 * 150
    assert len(ended) == len(submitted)
    assert admission.waiting == 0
    answered = 0
    for number, future in submitted:
        if future.cancelled():
            continue
        if future.exception() is not None:
            assert isinstance(future.exception(), DeadlineError)
        else:
            assert future.result() == 10 * number
            answered += 1
    assert answered > 0
