"""The back-end for engines: on the host, where every wrong order is a fault, and the same cases on a GPU."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace

import numpy as np
import pytest
from bundle_fixtures import add_engine, numpy_outputs, random_images, tiny_graph, write_bundle
from cuda_host import HostCuda
from trt_host import SCRATCH_BYTES, HostTensorRT

from runtime.backends import trt_worker
from runtime.backends.cuda_api import CudaError, CudaMemoryError
from runtime.backends.cuda_driver import CudaDevice, CudaDriver, cuda_device, cuda_driver
from runtime.backends.trt import TrtBackend
from runtime.backends.trt_installed import MODULES
from runtime.detector import Detector
from runtime.errors import BackendError, BundleError, UsageError
from runtime.manifest import ProfileSpec

PROFILE = ProfileSpec(1, 4, 16)
# Bytes of one picture in the input and in each output.
PICTURE_BYTES = (16 * 16 * 3, 4, 4, 4 * 128, 4 * 4 * 4)
L4 = CudaDevice("sm89", "NVIDIA L4")
# Largest difference from float64 NumPy: on the host the outputs are NumPy's, rounded to float32.
HOST_TOLERANCE = 1e-6
# Factors of 10 bits, as TF32 has, move these outputs by up to 7e-4, so that a GPU which used it would be seen. No
# device has measured what another order of sums does.
DEVICE_TOLERANCE = 5e-5


class Rig:
    """Opens the tiny engine; `cuda` and `trt` are the stand-ins on the host and None on a GPU."""

    def __init__(self, content, manifest, file, tolerance, cuda=None, trt=None):
        self.content, self.manifest, self.file, self.tolerance = content, manifest, file, tolerance
        self.cuda, self.trt = cuda, trt

    def open(self, **options):
        return TrtBackend(self.content, self.manifest, file=self.file, cuda=self.cuda, **options)

    def check(self, outputs, images):
        for name, expected in numpy_outputs(images).items():
            np.testing.assert_allclose(getattr(outputs, name), expected, atol=self.tolerance, rtol=0, err_msg=name)

    def check_closed(self):
        if self.cuda is not None:
            assert (self.cuda.faults, self.cuda.left(), self.cuda.closed) == ([], [], True)


def host_rig(folder, monkeypatch, *, flavour="trt", major=10, **changes):
    """The engine in a stand-in of a TensorRT, on the host; it joins the tiny bundle in `folder`."""
    cuda = HostCuda()
    trt = HostTensorRT(cuda, flavour=flavour, major=major)
    monkeypatch.setitem(sys.modules, MODULES[flavour], trt.module)
    monkeypatch.setattr("runtime.backends.trt.cuda_device", lambda: L4)
    monkeypatch.setattr("runtime.engine_check.cuda_driver", lambda: CudaDriver(1, "pretended"))
    builder = f"{MODULES[flavour]} {trt.module.__version__}"
    bundle = add_engine(folder, b"an engine", flavour=flavour, builder=builder, profile=PROFILE, **changes)
    return Rig(b"an engine", bundle.manifest, "model.fp32.engine", HOST_TOLERANCE, cuda, trt)


@pytest.fixture
def host(tiny_bundle, monkeypatch):
    """The engine in a stand-in of TensorRT 10, on the host."""
    return host_rig(tiny_bundle, monkeypatch)


@pytest.fixture(scope="module")
def device_rig(tmp_path_factory):
    """The engine as TensorRT builds it here, on the GPU of this machine."""
    device = cuda_device()
    if device is None:
        missing = f"no CUDA device: {cuda_driver().detail}"
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(f"REQUIRE_GPU=1, but {missing}")
        pytest.skip(missing)
    from export.engine import EngineSettings, engine_from_onnx
    from export.engine_flavours import find_tensorrt

    tensorrt, folder = find_tensorrt(), tmp_path_factory.mktemp("device") / "m"
    write_bundle(folder)
    built = engine_from_onnx(tiny_graph(), PROFILE, tensorrt=tensorrt, label="tiny", settings=EngineSettings())
    bundle = add_engine(
        folder, built.content, flavour=built.flavour, builder=built.builder, profile=PROFILE,
        targets=built.target.capabilities,
    )  # fmt: skip
    return Rig(built.content, bundle.manifest, "model.fp32.engine", DEVICE_TOLERANCE)


@pytest.fixture(params=["trt 10", "trt 11", "rtx 1", pytest.param("gpu", marks=pytest.mark.gpu)])
def rig(request, monkeypatch):
    if request.param == "gpu":
        return request.getfixturevalue("device_rig")
    flavour, major = request.param.split()
    tiny_bundle = request.getfixturevalue("tiny_bundle")
    return host_rig(tiny_bundle, monkeypatch, flavour=flavour, major=int(major))


# What holds on every TensorRT, on the host and on a GPU


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"hint": "throughput", "cuda_graphs": True}])
def test_batches_that_grow_shrink_and_repeat_give_the_outputs_of_the_graph(rig, options):
    backend = rig.open(**options)
    for seed, pictures in enumerate([1, 2, 16, 1, 3, 16, 5, 2, 2]):
        images = random_images(pictures, seed=seed)
        rig.check(backend.infer(images), images)
    backend.close()
    rig.check_closed()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_outputs_of_one_call_survive_the_next_and_the_close(rig, cuda_graphs):
    backend = rig.open(cuda_graphs=cuda_graphs)
    first = backend.infer(random_images(4, seed=1))
    kept = [array.copy() for array in first]
    backend.infer(random_images(4, seed=2))
    backend.close()
    for array, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("options", [{}, {"hint": "throughput"}, {"hint": "throughput", "cuda_graphs": True}])
def test_many_threads_at_once_each_get_their_own_outputs(rig, options):
    backend = rig.open(**options)

    def score(seed):
        images = random_images(1 + seed % 16, seed=seed)
        return images, backend.infer(images)

    with ThreadPoolExecutor(6) as pool:
        for images, outputs in pool.map(score, range(48)):
            rig.check(outputs, images)
    backend.close()
    rig.check_closed()


def test_pictures_that_lie_scattered_in_memory_are_scored(rig):
    backend = rig.open()
    images = random_images(8)[::-2]
    rig.check(backend.infer(images), images)
    backend.close()


def test_a_batch_beyond_the_profile_is_refused_at_load_and_at_call(rig):
    with pytest.raises(BackendError, match="got a batch of 17, wanted 1 to 16, its optimization profile"):
        rig.open(max_batch=17)
    backend = rig.open(max_batch=16)
    with pytest.raises(BackendError, match="got a batch of 17, wanted 1 to 16"):
        backend.infer(random_images(17))
    images = random_images(16)
    rig.check(backend.infer(images), images)
    backend.close()
    rig.check_closed()


@pytest.mark.parametrize("images", [np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16, 15, 3), np.uint8)])
def test_images_of_another_shape_or_type_are_refused(rig, images):
    backend = rig.open()
    with pytest.raises(UsageError, match=r"wanted uint8 \(N, 16, 16, 3\)"):
        backend.infer(images)
    backend.close()


def test_a_closed_engine_may_be_closed_again_and_scores_nothing(rig):
    backend = rig.open()
    backend.close()
    backend.close()
    with pytest.raises(UsageError, match="got a closed one"):
        backend.infer(random_images(1))
    rig.check_closed()


# Order, on the host


def test_a_batch_goes_up_is_computed_and_comes_down(host):
    backend = host.open()
    backend.infer(random_images(2))
    assert host.cuda.log == ["upload", "compute", *["download"] * 4]
    backend.close()


def test_a_batch_is_copied_while_the_one_before_it_is_computed(host, monkeypatch):
    """Two calls are held before they wait for their outputs, and the streams are run one after another."""
    backend = host.open()
    entered, released, wait = threading.Semaphore(0), threading.Event(), host.cuda.wait

    def held(event):
        entered.release()
        assert released.wait(10)
        wait(event)

    monkeypatch.setattr(host.cuda, "wait", held)
    batches = [random_images(2, seed=1), random_images(3, seed=2)]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(backend.infer, batch) for batch in batches]
        try:
            assert all(entered.acquire(timeout=10) for _ in batches)
            up, compute, _ = backend._workers[0]._streams
            with host.cuda.on_device():
                host.cuda.synchronize(up)
                assert host.cuda.log == ["upload"] * 2
                host.cuda.synchronize(compute)
                assert host.cuda.log == ["upload"] * 2 + ["compute"] * 2
        finally:
            released.set()
        for call, batch in zip(waiting, batches, strict=True):
            host.check(call.result(10), batch)
    backend.close()
    host.check_closed()


@pytest.mark.parametrize(("hint", "contexts"), [("latency", 1), ("throughput", 2)])
def test_one_engine_has_a_context_for_each_worker(host, hint, contexts):
    backend = host.open(hint=hint)
    assert [context.how.name for context in host.trt.contexts] == ["USER_MANAGED"] * contexts
    assert host.cuda.used_bytes() == contexts * SCRATCH_BYTES
    backend.close()
    host.check_closed()


def test_close_waits_for_the_calls_that_are_under_way(host, monkeypatch):
    backend = host.open()
    entered, released, wait = threading.Event(), threading.Event(), host.cuda.wait

    def held(event):
        entered.set()
        assert released.wait(10)
        wait(event)

    monkeypatch.setattr(host.cuda, "wait", held)
    images = random_images(2)
    with ThreadPoolExecutor(2) as pool:
        scoring = pool.submit(backend.infer, images)
        assert entered.wait(10)
        closing = pool.submit(backend.close)
        try:
            with pytest.raises(TimeoutError):
                closing.result(0.05)
            with pytest.raises(UsageError, match="got a closed one"):
                backend.infer(images)
        finally:
            released.set()
        host.check(scoring.result(10), images)
        closing.result(10)
    host.check_closed()


# Memory, on the host


def test_memory_is_taken_for_the_preferred_batch_and_grows_no_further_than_the_largest(host):
    backend = host.open()
    taken = []
    for pictures in (1, 6, 5, 9, 16, 1):
        backend.infer(random_images(pictures))
        taken.append(host.cuda.used_bytes() - SCRATCH_BYTES)
    picture = taken[0] // PROFILE.opt_batch
    assert taken == [picture * n for n in (4, 8, 8, 16, 16, 16)]
    assert host.cuda.calls.count("allocate") == 1 + 3 * 5
    assert {len(memory) for memory in host.cuda.pinned.values()} == {16 * size for size in PICTURE_BYTES}
    backend.close()
    host.check_closed()


def test_a_batch_that_memory_is_too_small_for_is_refused_and_a_smaller_one_is_scored(host):
    backend = host.open()
    small, large = random_images(4), random_images(16)
    backend.infer(small)
    host.cuda.memory_bytes = host.cuda.used_bytes()
    with pytest.raises(CudaMemoryError, match=r"allocate: got no memory for \d+ bytes .*score fewer pictures at once"):
        backend.infer(large)
    host.check(backend.infer(small), small)
    backend.close()
    host.check_closed()


@pytest.mark.parametrize("name", ["allocate", "allocate_pinned"])
@pytest.mark.parametrize("call", range(1, 6))
def test_memory_that_runs_out_half_way_is_given_back(host, name, call):
    backend = host.open()
    before = host.cuda.used_bytes()
    host.cuda.fail[name] = call
    images = random_images(2)
    with pytest.raises(CudaMemoryError):
        backend.infer(images)
    assert host.cuda.used_bytes() == before
    host.check(backend.infer(images), images)
    backend.close()
    host.check_closed()


@pytest.mark.parametrize(
    ("name", "call"),
    [("open_event", 1), ("open_event", 5), ("open_stream", 1), ("open_stream", 5), ("allocate", 1), ("allocate", 2)],
)
def test_an_engine_that_does_not_open_leaves_nothing_behind(host, name, call):
    host.cuda.fail[name] = call
    with pytest.raises(CudaError, match=name):
        host.open(hint="throughput")
    host.check_closed()


def test_an_execution_context_that_cannot_be_made_is_said_in_the_words_of_tensorrt(host):
    host.trt.refuse.add("create_execution_context")
    with pytest.raises(BackendError, match=r"got no execution context \(out of memory for a context\)"):
        host.open()
    host.check_closed()


# Failures of a call, on the host


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("execute_async_v3", r"an inference that TensorRT could not start \(Error Code 1: Cuda Runtime"),
        ("set_input_shape", r"a batch of 2 that the execution context does not take \(a shape that does not fit\)"),
    ],
)
def test_a_refusal_of_tensorrt_is_told_in_its_words_and_the_next_call_succeeds(host, name, message):
    backend = host.open()
    host.trt.refuse.add(name)
    images = random_images(2)
    with pytest.raises(BackendError, match=message):
        backend.infer(images)
    for seed in range(3):
        images = random_images(2, seed=seed)
        host.check(backend.infer(images), images)
    backend.close()
    host.check_closed()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("free", "device"),
        ("free_pinned", "pinned"),
        ("close_event", "events"),
        ("close_stream", "streams"),
        ("close_graph", "graphs"),
    ],
)
def test_a_close_that_fails_half_way_gives_back_the_rest(host, name, kind):
    backend = host.open(cuda_graphs=True)
    host.check(backend.infer(random_images(2)), random_images(2))
    host.cuda.fail[name] = 1
    # The host complains of the one thing that it could not take back, and of nothing else.
    with pytest.raises(AssertionError, match=f"closed with {kind} open$"):
        backend.close()


@pytest.mark.parametrize("name", ["upload", "record", "stream_waits", "compute", "download", "wait"])
def test_a_call_of_cuda_that_fails_fails_its_batch_alone(host, name):
    backend = host.open()
    host.cuda.fail[name] = 1
    with pytest.raises(CudaError, match=f"{name}: got made to fail"):
        backend.infer(random_images(2))
    # Nothing of the failed batch is under way when its memory is used again.
    assert not any(stream.pending for stream in host.cuda.streams.values())
    images = random_images(3)
    host.check(backend.infer(images), images)
    backend.close()
    host.check_closed()


# CUDA graphs, on the host


def test_a_batch_size_is_captured_once_and_launched_from_then_on(host):
    backend = host.open(cuda_graphs=True)
    for seed, pictures in enumerate([2, 3, 2, 3, 2]):
        images = random_images(pictures, seed=seed)
        host.check(backend.infer(images), images)
    assert host.cuda.calls.count("begin_capture") == 2
    assert host.cuda.log.count("launch") == 3
    backend.close()
    host.check_closed()


def test_graphs_are_dropped_when_the_memory_they_point_to_moves(host):
    backend = host.open(cuda_graphs=True)
    for seed, pictures in enumerate([2, 16, 2]):
        images = random_images(pictures, seed=seed)
        host.check(backend.infer(images), images)
    assert host.cuda.calls.count("begin_capture") == 3
    backend.close()
    host.check_closed()


def test_no_more_graphs_are_kept_than_the_limit_and_the_oldest_goes_first(host, monkeypatch):
    monkeypatch.setattr(trt_worker, "_MAX_GRAPHS", 2)
    backend = host.open(cuda_graphs=True)
    for pictures in (1, 2, 1, 3, 1, 2):
        images = random_images(pictures, seed=pictures)
        host.check(backend.infer(images), images)
        assert len(host.cuda.graphs) <= 2
    # The second 1 and the third are launched; 3 took the place of 2.
    assert host.cuda.log.count("launch") == 2
    backend.close()
    host.check_closed()


@pytest.mark.parametrize("refuser", ["TensorRT", "begin_capture", "end_capture"])
def test_an_engine_that_cannot_be_captured_is_refused_with_what_to_do(host, refuser):
    backend = host.open(cuda_graphs=True)
    if refuser == "TensorRT":
        host.trt.refuse.add("capture")
    else:
        host.cuda.fail[refuser] = 1
    with pytest.raises(BackendError, match=r"cuda_graphs: got an engine that cannot be captured .*without cuda_graphs"):
        backend.infer(random_images(2))
    images = random_images(2)
    host.check(backend.infer(images), images)
    backend.close()
    host.check_closed()


def test_graphs_are_refused_where_the_package_has_none(host):
    host.cuda.has_graphs = False
    with pytest.raises(BackendError, match=r"cuda_graphs: got the package .*, which has no CUDA graphs"):
        host.open(cuda_graphs=True)
    host.check_closed()


@pytest.mark.parametrize(("cuda_graphs", "strategy"), [(False, None), (True, "WHOLE_GRAPH_CAPTURE")])
def test_tensorrt_rtx_is_told_to_capture_by_itself(tiny_bundle, monkeypatch, cuda_graphs, strategy):
    host = host_rig(tiny_bundle, monkeypatch, flavour="rtx", major=1)
    backend = host.open(cuda_graphs=cuda_graphs)
    backend.infer(random_images(2))
    assert getattr(host.trt.contexts[-1].how.cuda_graph_strategy, "name", None) == strategy
    assert "begin_capture" not in host.cuda.calls
    backend.close()
    host.check_closed()


def test_a_tensorrt_rtx_without_graphs_refuses_them(tiny_bundle, monkeypatch):
    host = host_rig(tiny_bundle, monkeypatch, flavour="rtx", major=1)
    del host.trt.module.CudaGraphStrategy
    with pytest.raises(BackendError, match=r"cuda_graphs: got tensorrt_rtx 1\.7\.1\.116, which has none"):
        host.open(cuda_graphs=True)
    host.check_closed()


# Engines that do not fit


def test_a_damaged_engine_and_a_missing_gpu_are_told_apart(host, monkeypatch):
    with pytest.raises(BundleError, match="got a file that TensorRT cannot read, though there is a GPU"):
        TrtBackend(b"damaged", host.manifest, file=host.file, cuda=host.cuda)
    host.check_closed()
    monkeypatch.setattr("runtime.backends.trt.cuda_device", lambda: None)
    with pytest.raises(BackendError, match="got no GPU, wanted an NVIDIA GPU with its driver"):
        TrtBackend(b"damaged", host.manifest, file=host.file, cuda=HostCuda())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"got an engine of version 10\.9\.0\.34, wanted one of version 10\.13"),
        (
            {"builder": "tensorrt 10.13.3.9", "targets": ("sm86",)},
            r"got an engine for sm86, wanted one for sm89 \(NVIDIA L4\)",
        ),
    ],
)
def test_an_engine_of_another_version_or_target_is_refused_with_how_to_build_one(
    tiny_bundle, monkeypatch, changes, message
):
    host = host_rig(tiny_bundle, monkeypatch)
    host.manifest = add_engine(tiny_bundle, b"other", file="other.engine", profile=PROFILE, **changes).manifest
    with pytest.raises(BackendError, match=f"{message}.*python -m export.trt --model BUNDLE --fp32"):
        TrtBackend(b"other", host.manifest, file="other.engine", cuda=host.cuda)
    assert host.cuda.calls == []


def test_an_engine_whose_profile_is_not_that_of_the_manifest_is_refused(host):
    host.trt.profile = (1, 4, 8)
    with pytest.raises(BundleError, match="got an engine for batches 1/4/8, wanted the profile of the manifest"):
        host.open()
    host.check_closed()


def test_an_engine_that_breaks_the_contract_is_refused(host):
    host.manifest = replace(host.manifest, evidence_shape=(3, 3))
    with pytest.raises(BundleError, match=r"outputs: got evidence .*\(N, 4, 4\), wanted evidence .*\(N, 3, 3\)"):
        host.open()
    host.check_closed()


def test_a_missing_tensorrt_is_said_with_its_package(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r'no package tensorrt.*pip install "ntf-toolkit\[trt\]"'):
        host.open()


# Through the public interface


def test_a_detector_scores_on_an_engine_of_its_bundle(tiny_bundle, monkeypatch):
    host = host_rig(tiny_bundle, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for module in ("trt_installed", "trt"):
        monkeypatch.setattr(f"runtime.backends.{module}.cuda_device", lambda: L4)
        monkeypatch.setattr(f"runtime.backends.{module}.open_cuda_api", lambda *name: host.cuda)
    monkeypatch.setattr("runtime.backends.trt_installed.cuda_driver", lambda: CudaDriver(1, "pretended"))
    monkeypatch.setattr("runtime.backends.trt_installed.installed_cuda_api", lambda: "cuda-bindings")
    monkeypatch.setattr("runtime.backends.trt_installed._try_device", lambda cuda: None)
    images = random_images(9)
    with Detector.load(tiny_bundle, backend="trt", hint="throughput", cuda_graphs=True) as detector:
        info = detector.info
        assert (info.backend, info.device, info.artifact) == ("trt", "cuda:0", "model.fp32.engine")
        assert info.backend_version == "tensorrt 10.13.3.9"
        found = [detection.trace_similarity for detection in detector.predict(list(images), batch_size=4)]
        np.testing.assert_allclose(found, numpy_outputs(images)["trace_similarity"], atol=HOST_TOLERANCE)
        with pytest.raises(BackendError, match="got a batch of 17, wanted 1 to 16"):
            detector.predict(list(random_images(17)))
    host.check_closed()
    with pytest.raises(BackendError, match="got a batch of 17, wanted 1 to 16"):
        Detector.load(tiny_bundle, backend="trt", max_batch=17)
