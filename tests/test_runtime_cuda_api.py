"""Both implementations of `CudaApi` on stand-ins for their packages: an engine scores, and errors are named."""

from __future__ import annotations

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bundle_fixtures import random_images
from cuda_host import HostCuda
from cuda_modules import cuda_bindings_module, pycuda_module
from test_runtime_trt import host_rig

from runtime.backends.cuda_api import CudaError, CudaMemoryError, installed_cuda_api, open_cuda_api
from runtime.backends.cuda_driver import CudaDriver, cuda_driver
from runtime.backends.trt_installed import probe_trt
from runtime.errors import BackendError

PACKAGES = ("cuda-bindings", "pycuda")


@pytest.fixture
def put(monkeypatch):
    """Puts the stand-in of a package, on a host, in the place of the real one."""

    def place(package, host):
        name = {"cuda-bindings": "cuda.bindings.runtime", "pycuda": "pycuda.driver"}[package]
        module = (cuda_bindings_module if package == "cuda-bindings" else pycuda_module)(host)
        parts = name.split(".")
        for length in range(1, len(parts)):
            parent = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return place


@pytest.fixture(params=PACKAGES)
def rig(request, put, tiny_bundle, monkeypatch):
    """The tiny engine on a package; `package` is its name."""
    rig = host_rig(tiny_bundle, monkeypatch)
    rig.host, rig.package = rig.cuda, request.param
    put(request.param, rig.host)
    rig.cuda = open_cuda_api(request.param)
    return rig


def check_clean(host):
    assert (host.faults, host.left()) == ([], [])


def test_an_engine_scores_on_it_from_several_threads(rig):
    backend = rig.open(hint="throughput")

    def score(seed):
        images = random_images(1 + seed % 16, seed=seed)
        return images, backend.infer(images)

    with ThreadPoolExecutor(4) as pool:
        for images, outputs in pool.map(score, range(24)):
            rig.check(outputs, images)
    backend.close()
    check_clean(rig.host)


def test_each_call_of_an_engine_is_made_on_the_device_and_leaves_the_thread_as_it_was(rig):
    backend = rig.open()
    if rig.package == "pycuda":
        (context,) = sys.modules["pycuda.driver"].contexts
        assert context.held == []
    thread = threading.Thread(target=backend.close)
    thread.start()
    thread.join()
    check_clean(rig.host)
    assert rig.host.closed == (rig.package == "pycuda")


def test_too_little_memory_is_told_apart_from_other_errors(rig):
    backend = rig.open()
    for name, kind in (("allocate", CudaMemoryError), ("allocate_pinned", CudaMemoryError), ("record", CudaError)):
        rig.host.fail[name] = 1
        with pytest.raises(CudaError) as caught:
            backend.infer(random_images(2))
        assert type(caught.value) is kind
        assert ("score fewer pictures at once" in caught.value.remedy) == (kind is CudaMemoryError)
    images = random_images(2)
    rig.check(backend.infer(images), images)
    backend.close()
    check_clean(rig.host)


def test_graphs_run_on_cuda_bindings_and_are_refused_on_pycuda(rig):
    if rig.package == "pycuda":
        with pytest.raises(BackendError, match=r"cuda_graphs: got the package pycuda, which has no CUDA graphs"):
            rig.open(cuda_graphs=True)
        with rig.cuda.on_device(), pytest.raises(CudaError, match="CUDA graphs: got the package pycuda"):
            rig.cuda.begin_capture(1)
    else:
        backend = rig.open(cuda_graphs=True)
        for seed, pictures in enumerate([2, 2, 16, 2]):
            images = random_images(pictures, seed=seed)
            rig.check(backend.infer(images), images)
        backend.close()
        assert rig.host.log.count("launch") == 1
        # What a graph is instantiated from is given back at once.
        assert sum(call.startswith("destroyed") for call in rig.host.calls) == 3
    check_clean(rig.host)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_does_not_import_is_refused_with_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime" if package == "cuda-bindings" else "pycuda.driver", None)
    if package == "pycuda":
        monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(CudaError, match=rf'package {package}: .*pip install "ntf-toolkit\[gpu\]"'):
        open_cuda_api(package)


@pytest.mark.parametrize(("installed", "found"), [(PACKAGES, "cuda-bindings"), (("pycuda",), "pycuda"), ((), None)])
def test_cuda_bindings_is_taken_before_pycuda_and_none_is_refused(installed, found, monkeypatch):
    monkeypatch.setattr("runtime.backends.cuda_api.installed_version", lambda name: "1" if name in installed else None)
    assert installed_cuda_api() == found
    if found is None:
        with pytest.raises(CudaError, match="got neither the package cuda-bindings nor pycuda"):
            open_cuda_api()


def test_the_real_cuda_bindings_say_that_there_is_no_driver():
    pytest.importorskip("cuda.bindings.runtime")
    if cuda_driver().devices:
        pytest.skip("there is a driver here")
    with pytest.raises(CudaError, match="cudaSetDevice: got CUDA error 35, CUDA driver version is insufficient"):
        open_cuda_api("cuda-bindings")


def test_the_real_cuda_bindings_have_every_call_that_is_made_of_them():
    real = pytest.importorskip("cuda.bindings.runtime")
    stand_in = cuda_bindings_module(HostCuda())
    for name in (name for name in vars(stand_in) if name.startswith("cuda")):
        assert hasattr(real, name), name
    for name in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for member in getattr(stand_in, name):
            assert int(getattr(getattr(real, name), member.name)) == int(member), member


# The probe


@pytest.fixture
def pretended(monkeypatch, put):
    """A machine with a GPU, TensorRT 10 and cuda-bindings, all pretended; gives the host."""
    host = HostCuda()
    put("cuda-bindings", host)
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__version__ = "10.13.3.9"
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("runtime.backends.trt_installed.cuda_driver", lambda: CudaDriver(1, "pretended"))
    monkeypatch.setattr("runtime.backends.trt_installed.installed_cuda_api", lambda: "cuda-bindings")
    return host


def test_the_probe_copies_there_and_back_and_leaves_nothing_open(pretended):
    probe = probe_trt()
    assert (probe.runs, probe.device, probe.version) == (True, "cuda:0", "tensorrt 10.13.3.9")
    assert pretended.log == ["upload", "download"]
    check_clean(pretended)


def test_the_probe_sees_a_device_that_copies_wrongly(pretended, monkeypatch):
    monkeypatch.setattr(pretended, "upload", lambda *arguments: None)
    monkeypatch.setattr(pretended, "download", lambda target, address, stream: target.fill(9))
    probe = probe_trt()
    assert not probe.runs
    assert probe.reason == "the GPU: [9, 9] after a copy there and back"


@pytest.mark.parametrize(
    ("change", "reason", "install"),
    [
        (("cuda_driver", lambda: CudaDriver(0, "no NVIDIA driver")), "no NVIDIA driver", "run where there is"),
        (("installed_cuda_api", lambda: None), "neither cuda-bindings nor pycuda is installed", "cuda-bindings"),
        (("import_tensorrt", None), "no package tensorrt", r"ntf-toolkit[trt]"),
    ],
)
def test_the_probe_says_what_is_missing(pretended, monkeypatch, change, reason, install):
    name, value = change
    if value is None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        monkeypatch.setattr(f"runtime.backends.trt_installed.{name}", value)
    probe = probe_trt()
    assert (probe.runs, reason in probe.reason, install in probe.install) == (False, True, True)


def test_the_probe_says_which_call_of_cuda_failed(pretended):
    pretended.fail["allocate"] = 1
    probe = probe_trt()
    assert not probe.runs
    assert probe.reason.startswith("cudaMalloc: no memory for 2 bytes")
    check_clean(pretended)


def test_a_copy_gives_the_bytes_that_went_up():
    host = HostCuda()
    with host.on_device():
        stream, address, memory = host.open_stream(), host.allocate(3), host.allocate_pinned(3)
        memory[:] = (1, 2, 3)
        host.upload(address, memory, stream)
        host.synchronize(stream)
        np.testing.assert_array_equal(host.bytes_at(address, 3), [1, 2, 3])
