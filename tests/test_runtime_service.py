from __future__ import annotations

import asyncio
import concurrent.futures
import io
import threading
import time

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images, tiny_graph, write_bundle
from PIL import Image

from runtime import Detector, DetectorService
from runtime.backends import Outputs
from runtime.errors import (
    BackendError,
    BundleError,
    ClosedError,
    DeadlineError,
    PictureError,
    QueueFullError,
    UsageError,
)
from runtime.manifest import OUTPUTS

# Reached only by a test that fails.
PATIENCE_S = 30
# Added to every logit by the graph of the second bundle, so that a score says which one gave it.
OFFSET = 2.0


class GatedBackend:
    """A back-end that computes in NumPy, one batch each time its gate is opened."""

    name, device, version = "onnxruntime", "cpu", "gated"

    def __init__(self, offset):
        self.offset = offset
        self.batches = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.closed = False
        self.error = None

    def infer(self, images):
        assert not self.closed
        self.batches.append(len(images))
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        outputs = numpy_outputs(images, offset=self.offset)
        return Outputs(**{name: outputs[name].astype(np.float32) for name in OUTPUTS})

    def close(self):
        self.closed = True

    def await_batch(self):
        assert self.entered.acquire(timeout=PATIENCE_S)

    def open(self, batches=10_000):
        self.gate.release(batches)


@pytest.fixture(scope="session")
def second_bundle(tmp_path_factory):
    """Folder of a bundle whose scores are others than the tiny bundle's."""
    folder = tmp_path_factory.mktemp("second") / "second"
    write_bundle(folder, name="second", graphs={"fp32": tiny_graph(offset=OFFSET)})
    return folder


@pytest.fixture
def backends(monkeypatch):
    """Gated back-ends in place of real ones, in the order of their opening."""
    opened = []

    def open_backend(name, model, manifest, *, file, **options):
        opened.append(GatedBackend(OFFSET if manifest.name == "second" else 0.0))
        if len(opened) > 1:
            opened[-1].open()  # a swap warms it up
        return opened[-1]

    monkeypatch.setattr("runtime.detector.open_backend", open_backend)
    yield opened
    for backend in opened:
        backend.open()


@pytest.fixture
def gated(tiny_bundle, backends):
    """A service on a gated back-end: (service, back-end)."""
    with DetectorService.load(tiny_bundle, max_batch_size=4, max_wait_ms=0, max_queue=6) as service:
        yield service, backends[0]
        backends[0].open()


@pytest.fixture
def service(tiny_bundle):
    with DetectorService.load(tiny_bundle, backend="onnxruntime", threads=1, max_batch_size=8) as opened:
        yield opened


def eventually(condition):
    """Waits until a condition holds."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.001)


def _png(rgb):
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()


def probabilities(images, *, offset=0.0):
    logits = numpy_outputs(np.stack(images))["logits"] + offset
    return 1 / (1 + np.exp(-(logits / 0.5 - 0.5)))


def assert_scores(detections, images, *, offset=0.0):
    found = [detection.fake_probability for detection in detections]
    np.testing.assert_allclose(found, probabilities(images, offset=offset), atol=1e-6)


def test_every_way_in_gives_what_the_detector_gives(service, tiny_bundle, tmp_path):
    images = random_images(20)
    (tmp_path / "a.png").write_bytes(_png(images[0]))
    sources = [str(tmp_path / "a.png"), *(_png(rgb) for rgb in images[1:10]), *images[10:], b"damaged", tmp_path]
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        expected = detector.predict(sources)

    async def detect_all():
        return await asyncio.gather(*(service.detect(source) for source in sources))

    submitted = [service.submit(source) for source in sources]
    for detections in (
        [future.result(PATIENCE_S) for future in submitted],
        asyncio.run(detect_all()),
        service.predict(sources),
        list(service.stream(iter(sources))),
    ):
        assert_scores(detections[:20], images)
        for found, wanted in zip(detections, expected, strict=True):
            assert (found.verdict, found.error) == (wanted.verdict, wanted.error)
            if wanted.error is None:
                assert found.trace_similarity == pytest.approx(wanted.trace_similarity, abs=1e-6)
                np.testing.assert_allclose(found.evidence, wanted.evidence, atol=1e-5)


def test_picture_is_named_by_what_it_is_and_among_others_by_its_place(service, tmp_path):
    sources = [str(tmp_path / "gone.png"), b"x", random_images(1)[0]]
    alone = [service.submit(source).result(PATIENCE_S).source for source in sources]
    assert alone == [sources[0], "1 bytes", "array (16, 16, 3)"]
    among_others = [detection.source for detection in service.predict(sources)]
    assert among_others == [sources[0], "#1 (1 bytes)", "#2 (array (16, 16, 3))"]


def test_picture_that_cannot_be_read_needs_no_batch(gated):
    service, backend = gated
    detection = service.submit(b"damaged").result(PATIENCE_S)
    assert "no known picture format" in detection.error
    assert detection.verdict is None
    assert backend.batches == []


def test_pictures_of_many_threads_are_scored_together(gated):
    service, backend = gated
    images = random_images(5)
    first = service.submit(images[0])
    backend.await_batch()
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        others = list(clients.map(service.submit, images[1:]))
    eventually(lambda: len(service._lane._batcher._ready) == 4)
    assert service.queue_length == 4
    backend.open()
    assert_scores([future.result(PATIENCE_S) for future in [first, *others]], images)
    assert backend.batches == [1, 4]
    assert service.queue_length == 0


def test_views_of_a_picture_are_scored_together_and_at_most_a_batch_at_once(gated):
    service, backend = gated
    backend.open()
    rgb = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    detection = service.submit(rgb, views="grid").result(PATIENCE_S)
    crops = [rgb[row : row + 16, column : column + 16] for row in (0, 16, 32) for column in (0, 16, 32)]
    logit = numpy_outputs(np.stack(crops))["logits"].mean()
    assert detection.fake_probability == pytest.approx(1 / (1 + np.exp(-(logit / 0.5 - 0.5))), abs=1e-6)
    assert backend.batches == [4, 4, 1]
    with pytest.raises(UsageError, match="views: got 'all'"):
        service.submit(rgb, views="all")


def test_pictures_that_are_looked_at_in_other_ways_share_a_batch(service, tiny_bundle):
    rgb = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    ways = [{}, {"views": "five"}, {"stability": True}, {"views": "grid", "stability": True}]
    futures = [service.submit(_png(rgb), **way) for way in ways]
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        for future, way in zip(futures, ways, strict=True):
            [wanted] = detector.predict([_png(rgb)], **way)
            found = future.result(PATIENCE_S)
            assert found.fake_probability == pytest.approx(wanted.fake_probability, abs=1e-6)
            assert found.verdict == wanted.verdict
            assert (found.stability is None) == ("stability" not in way)
    streamed = service.predict([rgb], stability=True)[0]
    assert streamed.stability is not None


def test_array_may_be_filled_anew_after_submit(gated):
    service, backend = gated
    images = random_images(3)
    buffer = np.empty_like(images[0])
    futures = []
    for rgb in images:
        buffer[:] = rgb
        futures.append(service.submit(buffer))
    backend.open()
    assert_scores([future.result(PATIENCE_S) for future in futures], images)


def test_one_pillow_image_in_many_hands_is_scored_each_time(service, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(_png(rgb))
    with Image.open(tmp_path / "a.png") as image:
        futures = [service.submit(image) for _ in range(8)]
        assert_scores([future.result(PATIENCE_S) for future in futures], [rgb[442:458, 442:458]] * 8)


def test_full_queue_refuses_submit_at_once_and_makes_predict_wait(gated):
    service, backend = gated
    images = random_images(30)
    service.submit(images[0])
    backend.await_batch()
    waiting = [service.submit(images[0]) for _ in range(6)]
    with pytest.raises(QueueFullError, match="got 6 requests that wait already"):
        service.submit(images[0])
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        predicted = other.submit(service.predict, images)
        with pytest.raises(concurrent.futures.TimeoutError):
            predicted.result(0.02)
        backend.open()
        assert_scores(predicted.result(PATIENCE_S), images)
    assert all(future.result(PATIENCE_S).error is None for future in waiting)


def test_stream_takes_sources_as_needed_and_gives_back_what_is_not_wanted(gated):
    service, backend = gated
    backend.open()
    taken = []

    def pictures():
        while True:
            taken.append(None)
            yield random_images(1)[0]

    stream = service.stream(pictures())
    for count in range(1, 50):
        next(stream)
        assert len(taken) - count < 4 * 4
    stream.close()
    assert len(taken) < 50 + 4 * 4
    eventually(lambda: service.queue_length == 0)


def test_stream_waits_with_three_batches_on_their_way(tiny_bundle, backends):
    images = list(random_images(30))
    taken, detections, opened = [], [], threading.Event()

    def pictures():
        for index, rgb in enumerate(images):
            assert index < 3 * 4 or opened.is_set()
            taken.append(index)
            yield rgb

    with DetectorService.load(tiny_bundle, max_batch_size=4, max_wait_ms=0, max_queue=100) as service:
        consumer = threading.Thread(target=lambda: detections.extend(service.stream(pictures())))
        consumer.start()
        eventually(lambda: len(taken) == 3 * 4)
        opened.set()
        backends[0].open()
        consumer.join(PATIENCE_S)
    assert_scores(detections, images)


def test_stream_that_is_left_takes_its_pictures_out_of_the_queue(tiny_bundle, backends):
    images = random_images(10)
    with DetectorService.load(tiny_bundle, max_batch_size=4, max_wait_ms=0, max_queue=100) as service:
        service.submit(images[0])
        backends[0].await_batch()
        stream, first = service.stream(images[1:]), []
        consumer = threading.Thread(target=lambda: first.append(next(stream)))
        consumer.start()
        eventually(lambda: service.queue_length == 9)
        backends[0].open(2)
        consumer.join(PATIENCE_S)
        eventually(lambda: service.queue_length == 1)  # four are scored, and the back-end is at four
        stream.close()
        assert service.queue_length == 0
        backends[0].open()
    assert_scores(first, images[1:2])
    assert backends[0].batches == [1, 4, 4]


def test_close_sends_away_at_once_who_waits_for_a_place(gated):
    service, backend = gated
    service.submit(random_images(1)[0])
    backend.await_batch()
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        predicted = other.submit(service.predict, random_images(20))
        eventually(lambda: service.queue_length == 6)
        closing = threading.Thread(target=service.close)
        closing.start()
        with pytest.raises(ClosedError):
            predicted.result(PATIENCE_S)  # the back-end is at its first batch still
        backend.open()
        closing.join(PATIENCE_S)
    assert backend.batches == [1]


def test_late_picture_raises_and_is_never_scored(gated):
    service, backend = gated
    service.submit(random_images(1)[0])
    backend.await_batch()
    late, kept = service.submit(random_images(1)[0], timeout_s=0.01), service.submit(random_images(1)[0])
    with pytest.raises(DeadlineError, match=r"got no answer within 0\.01 s"):
        late.result(PATIENCE_S)
    with pytest.raises(DeadlineError):
        asyncio.run(service.detect(random_images(1)[0], timeout_s=0.01))
    backend.open()
    assert kept.result(PATIENCE_S).error is None
    assert backend.batches == [1, 1]


def test_cancelled_task_takes_its_picture_out_of_the_queue(gated):
    service, backend = gated
    images = random_images(3)

    async def cancel_one():
        first = asyncio.create_task(service.detect(images[0]))
        await asyncio.to_thread(backend.await_batch)
        kept, cancelled = (asyncio.create_task(service.detect(rgb)) for rgb in images[1:])
        await asyncio.to_thread(eventually, lambda: service.queue_length == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert service.queue_length == 1
        backend.open()
        return [await first, await kept]

    assert_scores(asyncio.run(cancel_one()), images[:2])
    assert backend.batches == [1, 1]


def test_loop_goes_on_while_pictures_are_scored(gated):
    service, backend = gated

    async def count_meanwhile():
        task = asyncio.create_task(service.detect(random_images(1)[0]))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
            if turns == 100:  # all of them while the back-end works
                backend.open()
        return turns

    assert asyncio.run(count_meanwhile()) >= 100


def test_error_of_the_back_end_goes_to_its_pictures_and_the_next_are_scored(gated):
    service, backend = gated
    backend.error = BackendError("back-end", got="a broken device", wanted="one that works", remedy="look at it")
    backend.open()
    with pytest.raises(BackendError, match="a broken device"):
        service.submit(random_images(1)[0]).result(PATIENCE_S)
    with pytest.raises(BackendError, match="a broken device"):
        service.predict(random_images(2))
    backend.error = None
    assert_scores(service.predict(random_images(2)), random_images(2))


def test_service_says_what_runs_and_warms_up_the_smallest_and_the_largest_batch(gated):
    service, backend = gated
    assert (service.info.model, service.manifest.name, service.closed) == ("tiny", "tiny", False)
    assert repr(service) == "<DetectorService tiny: fp32 on onnxruntime>"
    backend.open()
    service.warm_up()
    assert backend.batches == [1, 4]
    service.close()
    assert service.closed
    assert repr(service).endswith(", closed>")


def test_close_scores_what_waits_and_refuses_what_comes(gated):
    service, backend = gated
    images = random_images(6)
    futures = [service.submit(rgb) for rgb in images]
    backend.await_batch()
    closing = threading.Thread(target=service.close)
    closing.start()
    eventually(lambda: service.closed)
    with pytest.raises(ClosedError, match="got a request to a closed one"):
        service.submit(images[0])
    assert not backend.closed
    backend.open()
    closing.join(PATIENCE_S)
    assert backend.closed
    assert_scores([future.result(0) for future in futures], images)
    service.close(drain=False)
    with pytest.raises(ClosedError):
        service.predict(images)


def test_close_without_draining_names_the_reason_to_everyone_who_waits(gated):
    service, backend = gated
    images = random_images(40)
    first = service.submit(images[0])
    backend.await_batch()
    waiting = [service.submit(rgb) for rgb in images[1:4]]
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        predicted = other.submit(service.predict, images)  # fills the queue, then waits for a place
        eventually(lambda: service.queue_length == 6)
        closing = threading.Thread(target=service.close, kwargs={"drain": False})
        closing.start()
        for future in [*waiting, predicted]:
            with pytest.raises(ClosedError):
                future.result(PATIENCE_S)
        backend.open()
        closing.join(PATIENCE_S)
    assert_scores([first.result(PATIENCE_S)], images[:1])
    assert backend.batches == [1]


def test_end_of_a_with_block_scores_what_waits(tiny_bundle):
    images = random_images(50)
    with DetectorService.load(tiny_bundle, backend="onnxruntime", threads=1) as service:
        futures = [service.submit(_png(rgb)) for rgb in images]
    assert_scores([future.result(0) for future in futures], images)


def test_swap_ends_old_pictures_on_the_old_bundle_and_new_ones_on_the_new(gated, backends, second_bundle):
    service, old = gated
    images = random_images(6)
    before = [service.submit(rgb) for rgb in images[:3]]
    old.await_batch()
    swapping = threading.Thread(target=service.swap, args=(second_bundle,))
    swapping.start()
    eventually(lambda: service.info.model == "second")
    after = [service.submit(rgb) for rgb in images[3:]]
    assert_scores([future.result(PATIENCE_S) for future in after], images[3:], offset=OFFSET)
    assert not any(future.done() for future in before)
    assert swapping.is_alive()
    assert not old.closed
    old.open()
    swapping.join(PATIENCE_S)
    assert old.closed
    assert_scores([future.result(0) for future in before], images[:3])
    assert backends[1].batches[:2] == [1, 4]  # warmed up before the first picture
    assert service.manifest.name == "second"


def test_picture_that_comes_as_the_bundle_changes_goes_to_the_new_one(gated, second_bundle, monkeypatch):
    service, old = gated
    old.open()
    submit = service._lane.submit

    def submit_late(*arguments, **options):
        service.swap(second_bundle)  # between the choice of the old bundle and its queue
        return submit(*arguments, **options)

    monkeypatch.setattr(service._lane, "submit", submit_late)
    images = random_images(1)
    assert_scores([service.submit(images[0]).result(PATIENCE_S)], images, offset=OFFSET)


def test_swap_under_load_loses_no_request(tiny_bundle, second_bundle):
    images = random_images(16)
    expected = {"tiny": probabilities(images), "second": probabilities(images, offset=OFFSET)}
    swapped = threading.Event()
    found, failures = [], []

    def client(service):
        try:
            last_round = False
            while not last_round:
                last_round = swapped.is_set()
                for index, rgb in enumerate(images):
                    found.append((index, service.submit(rgb, timeout_s=PATIENCE_S)))
                found[-1][1].result(PATIENCE_S)
        except Exception as error:
            failures.append(error)

    with DetectorService.load(tiny_bundle, backend="onnxruntime", threads=1, max_queue=1000) as service:
        clients = [threading.Thread(target=client, args=(service,)) for _ in range(3)]
        for thread in clients:
            thread.start()
        eventually(lambda: found)
        for model in (second_bundle, tiny_bundle, second_bundle):
            service.swap(model)
        swapped.set()
        for thread in clients:
            thread.join(PATIENCE_S)
        last = service.predict(images)
    assert not failures
    seen = set()
    for index, future in found:
        score = future.result(0).fake_probability
        near = [name for name, scores in expected.items() if abs(scores[index] - score) < 1e-6]
        assert len(near) == 1, score
        seen.update(near)
    assert seen == {"tiny", "second"}
    assert_scores(last, images, offset=OFFSET)


def test_bundle_that_cannot_take_over_leaves_the_old_one_at_work(gated, backends, second_bundle, tmp_path, monkeypatch):
    service, old = gated
    old.open()
    with pytest.raises(BundleError, match="nothing there"):
        service.swap(tmp_path / "missing")
    monkeypatch.setattr(Detector, "warm_up", lambda *_: pytest.fail("broken graph"))
    with pytest.raises(pytest.fail.Exception, match="broken graph"):
        service.swap(second_bundle)
    assert backends[1].closed
    assert not old.closed
    assert_scores(service.predict(random_images(2)), random_images(2))
    assert service.info.model == "tiny"


def test_swap_keeps_the_options_of_load_but_for_those_that_it_is_given(tiny_bundle, second_bundle):
    rgb = np.zeros((20, 20, 3), np.uint8)
    with DetectorService.load(tiny_bundle, backend="onnxruntime", threads=1, max_pixels=100) as service:
        service.swap(second_bundle)
        assert service.info.backend == "onnxruntime"
        assert "at most 100 pixels" in service.predict([rgb])[0].error
        service.swap(second_bundle, max_pixels=400)
        assert service.predict([rgb])[0].error is None


def test_swap_of_a_closed_service_is_refused_and_leaves_nothing_open(gated, backends, second_bundle):
    service, _ = gated
    service.close()
    with pytest.raises(ClosedError):
        service.swap(second_bundle)
    assert backends[1].closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ntf-infer")]


@pytest.mark.parametrize("action", ["close", "swap", "stream"])
def test_callback_that_would_wait_for_itself_is_refused(gated, second_bundle, action):
    service, backend = gated
    refused = concurrent.futures.Future()
    actions = {
        "close": service.close,
        "swap": lambda: service.swap(second_bundle),
        "stream": lambda: service.predict([random_images(1)[0]]),
    }

    def act(_):
        try:
            actions[action]()
        except UsageError as error:
            refused.set_result(str(error))

    service.submit(random_images(1)[0]).add_done_callback(act)
    backend.open()
    assert f"{action}: got a call from a callback of a future" in refused.result(PATIENCE_S)
    assert not service.closed


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_queue": 2.5}, "max_queue"),
        ({"max_wait_ms": -1}, "max_wait_ms"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_number_out_of_its_range_is_refused(tiny_bundle, options, name):
    with pytest.raises(UsageError, match=f"{name}: got "):
        DetectorService.load(tiny_bundle, **options)


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), "1", True])
def test_time_that_makes_no_sense_is_refused(gated, timeout_s):
    service, _ = gated
    with pytest.raises(UsageError, match=r"timeout_s: got .*, wanted a finite number above 0"):
        service.submit(random_images(1)[0], timeout_s=timeout_s)
    assert service.queue_length == 0


@pytest.mark.parametrize("single", ["a.jpg", b"bytes", random_images(1)[0], 5])
def test_single_picture_instead_of_a_list_is_refused(gated, single):
    service, _ = gated
    with pytest.raises(UsageError, match="put a single picture in a list"):
        service.predict(single)


def test_observer_sees_every_batch(tiny_bundle):
    class Counting:
        pictures = 0

        def batch(self, size, wait_s, infer_s):
            assert len(wait_s) == size
            assert infer_s > 0
            self.pictures += size

    observer = Counting()
    with DetectorService.load(tiny_bundle, backend="onnxruntime", threads=1, observer=observer) as service:
        service.predict([*random_images(20), b"damaged"])
    assert observer.pictures == 20


def test_errors_are_told_apart_by_their_class():
    for kind in (QueueFullError, DeadlineError, ClosedError):
        assert not issubclass(kind, (UsageError, PictureError, BackendError))
