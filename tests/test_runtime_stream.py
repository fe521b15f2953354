from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images
from PIL import Image

from runtime import Detector
from runtime.errors import UsageError
from runtime.pipeline import BATCHES_AHEAD, pipelined

STATUS = Path("/proc/self/status")
# Reached only by a test that fails.
PATIENCE_S = 30


@pytest.fixture
def detector(tiny_bundle):
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as opened:
        yield opened


class Gate:
    """Stands in front of `infer`: each call waits until it is let through."""

    def __init__(self, detector, monkeypatch):
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.infer = detector._backend.infer
        monkeypatch.setattr(detector._backend, "infer", self)

    def __call__(self, images):
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        return self.infer(images)


def _file(rgb, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, kind)
    return stream.getvalue()


def _assert_scores(detections, images):
    logits = numpy_outputs(np.stack(images))["logits"]
    scores = [detection.fake_probability for detection in detections]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-(logits / 0.5 - 0.5))), atol=1e-6)


def test_next_batches_are_decoded_while_the_back_end_is_busy(detector, monkeypatch):
    images = random_images(8)
    gate = Gate(detector, monkeypatch)
    decoded, decoders = threading.Semaphore(0), set()
    prepare = detector.prepare

    def counted(source, **options):
        prepared = prepare(source, **options)
        decoders.add(threading.current_thread().name.rpartition("_")[0])
        decoded.release()
        return prepared

    monkeypatch.setattr(detector, "prepare", counted)
    detections = []
    stream = detector.stream([_file(rgb) for rgb in images], batch_size=2)
    consumer = threading.Thread(target=lambda: detections.extend(stream))
    consumer.start()
    assert gate.entered.acquire(timeout=PATIENCE_S)
    for _ in range(BATCHES_AHEAD * 2):  # all while the first batch is in the back-end
        assert decoded.acquire(timeout=PATIENCE_S)
    assert not detections
    gate.gate.release(4)
    consumer.join(PATIENCE_S)
    _assert_scores(detections, images)
    assert decoders == {"ntf-decode"}


def test_sources_are_taken_a_few_batches_ahead_and_not_more(detector):
    images = list(random_images(60))
    taken = []

    def pictures():
        for index, rgb in enumerate(images):
            taken.append(index)
            yield rgb

    detections = []
    for detection in detector.stream(pictures(), batch_size=3):
        detections.append(detection)
        # One batch more than is read ahead: the one that is handed out.
        assert len(taken) - len(detections) < (BATCHES_AHEAD + 1) * 3
    assert taken == list(range(60))
    _assert_scores(detections, images)


def test_buffer_of_a_source_may_be_filled_anew(detector):
    images = list(random_images(9))
    buffer = np.empty_like(images[0])

    def frames():
        for rgb in images:
            buffer[:] = rgb
            yield buffer

    _assert_scores(detector.stream(frames(), batch_size=2), images)


def test_error_of_the_source_comes_after_the_pictures_before_it(detector):
    images = list(random_images(5))

    def pictures():
        yield from images
        raise OSError("the camera is gone")

    detections = []
    with pytest.raises(OSError, match="the camera is gone"):
        detections.extend(detector.stream(pictures(), batch_size=2))
    _assert_scores(detections, images)


def test_error_of_the_back_end_comes_in_its_place(detector, monkeypatch):
    images = list(random_images(6))
    infer = detector._backend.infer
    calls = []

    def broken_second(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise ZeroDivisionError("broken")
        return infer(batch)

    monkeypatch.setattr(detector._backend, "infer", broken_second)
    stream = detector.stream(images, batch_size=2)
    _assert_scores([next(stream), next(stream)], images[:2])
    with pytest.raises(ZeroDivisionError, match="broken"):
        next(stream)
    assert threading.active_count() == _threads_without("ntf-stream")


def _threads_without(prefix):
    return sum(not thread.name.startswith(prefix) for thread in threading.enumerate())


def test_stream_that_is_left_early_leaves_no_thread_and_takes_no_more(detector):
    taken = []

    def pictures():
        while True:
            taken.append(None)
            yield random_images(1)[0]

    stream = detector.stream(pictures(), batch_size=1)
    next(stream)
    stream.close()
    seen = len(taken)
    assert seen <= BATCHES_AHEAD + 1
    assert threading.active_count() == _threads_without("ntf-stream")
    assert len(taken) == seen


def test_close_waits_for_the_back_end_and_a_stream_then_says_that_it_is_closed(detector, monkeypatch):
    gate = Gate(detector, monkeypatch)
    closed = []
    monkeypatch.setattr(detector._backend, "close", lambda: closed.append(gate.gate._value))
    stream = detector.stream([_file(rgb) for rgb in random_images(8)], batch_size=2)
    errors = []

    def consume():
        try:
            list(stream)
        except UsageError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert gate.entered.acquire(timeout=PATIENCE_S)
    closing = threading.Thread(target=detector.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert not closed
    gate.gate.release()
    closing.join(PATIENCE_S)
    consumer.join(PATIENCE_S)
    assert closed == [0]
    assert "got a closed one" in str(errors[0])


def test_files_that_wait_for_a_decoder_at_close_end_as_of_a_closed_detector(detector, monkeypatch):
    all_taken, go_on = threading.Event(), threading.Event()
    prepare = detector.prepare

    def slow(source, **options):
        assert go_on.wait(PATIENCE_S)
        return prepare(source, **options)

    def files():
        yield from [_file(rgb) for rgb in random_images(12)]
        all_taken.set()

    monkeypatch.setattr(detector, "prepare", slow)
    stream = detector.stream(files(), batch_size=12)
    errors = []

    def consume():
        try:
            list(stream)
        except BaseException as error:
            errors.append(error)

    consumer, closing = threading.Thread(target=consume), threading.Thread(target=detector.close)
    consumer.start()
    assert all_taken.wait(PATIENCE_S)
    closing.start()
    until = time.monotonic() + PATIENCE_S
    while not detector._pool._shutdown and time.monotonic() < until:
        time.sleep(0.001)
    go_on.set()
    consumer.join(PATIENCE_S)
    closing.join(PATIENCE_S)
    assert [type(error) for error in errors] == [UsageError]
    assert "got a closed one" in str(errors[0])


def test_pipeline_finishes_one_batch_at_a_time_in_order():
    working = threading.Lock()
    sizes = []

    def finish(batch):
        assert working.acquire(blocking=False)
        sizes.append(len(batch))
        working.release()
        return [10 * item for item in batch]

    assert list(pipelined(range(10), lambda item: item + 1, finish, batch_size=4)) == list(range(10, 110, 10))
    assert sizes == [4, 4, 2]
    assert list(pipelined([], lambda item: item, finish, batch_size=4)) == []


def _resident_mib():
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not STATUS.is_file(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_a_long_stream_and_bad_pictures_cost_only_themselves(detector, count):
    # 30 kB each: three thousand that are kept would be 90 MB.
    rng = np.random.default_rng(0)
    files = [_file(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8), "BMP") for _ in range(7)]
    expected = [detection.fake_probability for detection in detector.predict(files)]

    def pictures():
        for index in range(count):
            yield b"damaged" if index % 500 == 499 else files[index % 7] + bytes(1)  # a file of its own

    scores, highest = 0, 0.0
    for index, detection in enumerate(detector.stream(pictures())):
        assert detection.source.startswith(f"#{index} ")
        if index % 500 == 499:
            assert "no known picture format" in detection.error
        else:
            assert abs(detection.fake_probability - expected[index % 7]) < 1e-6
            scores += 1
        if index == 1000:
            settled = _resident_mib()
        if index >= 1000 and index % 200 == 0:
            highest = max(highest, _resident_mib())
    assert scores == count - count // 500
    assert highest - settled < 50
