"""OpenVINO's hints: several inferences at once, and batches cut into parts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images, tiny_graph, write_bundle

from runtime.backends import open_backend
from runtime.backends.openvino import OpenVinoBackend, compile_for_cpu
from runtime.errors import BackendError

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("openvino") / "m")


def check(outputs, images):
    for name, expected in numpy_outputs(images).items():
        np.testing.assert_allclose(getattr(outputs, name), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_a_hint_reaches_openvino(hint):
    assert str(compile_for_cpu(tiny_graph(), hint=hint).get_property("PERFORMANCE_HINT")).endswith(hint.upper())


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_many_threads_at_once_each_get_their_own_outputs(manifest, hint):
    backend = open_backend("openvino", tiny_graph(), manifest, file="model.onnx", threads=2, hint=hint)

    def score(seed):
        images = random_images(1 + seed % 9, seed=seed)
        return images, backend.infer(images)

    with ThreadPoolExecutor(6) as pool:
        for images, outputs in pool.map(score, range(60)):
            check(outputs, images)
    backend.close()


class Request:
    """An infer request that computes when it is waited for, and can be made to fail."""

    def __init__(self, log):
        self.log, self.images, self.results, self.fails = log, None, None, False
        self.memory = {}

    def start_async(self, inputs, share_inputs):
        assert self.images is None, "started while it was running"
        assert not share_inputs
        self.images = inputs["images"].copy()
        self.log.append(("start", len(self.images)))

    def wait(self):
        images, self.images = self.images, None
        self.log.append(("wait", len(images)))
        if self.fails:
            raise RuntimeError("made to fail")
        # In the same memory each time, as OpenVINO has them.
        for name, array in numpy_outputs(images).items():
            self.memory.setdefault(name, np.zeros((9, *array.shape[1:]), np.float32))[: len(array)] = array
        self.results = {name: memory[: len(images)] for name, memory in self.memory.items()}

    def cancel(self):
        self.images = None


@pytest.fixture
def parted(manifest):
    """A back-end with three requests that are stand-ins; gives it, the requests and what they did."""
    backend = OpenVinoBackend(tiny_graph(), manifest, file="model.onnx", threads=1, hint="throughput")
    while not backend._idle.empty():
        backend._idle.get()
    log = []
    requests = [Request(log) for _ in range(3)]
    backend._parts = 3
    for request in requests:
        backend._idle.put(request)
    return backend, requests, log


def test_a_batch_is_cut_into_parts_that_run_at_once_and_comes_back_in_order(parted):
    backend, _, log = parted
    images = random_images(8)
    check(backend.infer(images), images)
    assert log == [("start", 3), ("start", 3), ("start", 2), ("wait", 3), ("wait", 3), ("wait", 2)]
    check(backend.infer(images[:2]), images[:2])
    assert log[6:] == [("start", 1), ("start", 1), ("wait", 1), ("wait", 1)]


@pytest.mark.parametrize(
    ("others", "steps"),
    [(1, ["start", "start", "wait", "start", "wait", "wait"]), (2, ["start", "wait"] * 3)],
)
def test_a_call_that_finds_few_requests_idle_uses_its_own_again(parted, others, steps):
    backend, _, log = parted
    taken = [backend._idle.get() for _ in range(others)]
    images = random_images(9)
    check(backend.infer(images), images)
    assert [what for what, _ in log] == steps
    assert backend._idle.qsize() + len(taken) == 3


def test_a_call_waits_for_a_request_of_others_where_it_has_none(parted):
    backend, _, _ = parted
    taken = [backend._idle.get() for _ in range(3)]
    images, asked = random_images(3), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: asked.set() or backend.infer(images))
        assert asked.wait(10)
        assert not waiting.done()
        backend._idle.put(taken[0])
        check(waiting.result(10), images)


def test_an_inference_that_fails_gives_every_request_back(parted):
    backend, requests, _ = parted
    requests[1].fails = True
    with pytest.raises(BackendError, match=r"back-end openvino: got an inference that failed \(made to fail\)"):
        backend.infer(random_images(6))
    requests[1].fails = False
    assert backend._idle.qsize() == 3
    images = random_images(6, seed=1)
    check(backend.infer(images), images)


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_a_batch_after_one_that_failed_is_scored(manifest, hint, monkeypatch):
    backend = open_backend("openvino", tiny_graph(), manifest, file="model.onnx", threads=2, hint=hint)
    images = random_images(4)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.backends.openvino._outputs", lambda request: 1 / 0)
        with pytest.raises(BackendError, match="division by zero"):
            backend.infer(images)
    for _ in range(3):
        check(backend.infer(images), images)
    backend.close()
