"""Engines that do not run here are refused with the reason before TensorRT is given a byte of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bundle_fixtures import add_engine, tiny_graph

from runtime.backends.cuda_driver import CudaDevice, CudaDriver, cuda_device
from runtime.engine_check import EngineRuntime, check_batch, check_engine, deserialized_engine
from runtime.errors import BackendError, BundleError
from runtime.manifest import ProfileSpec

FILE = "model.fp32.engine"
CONTENT = b"an engine"
L4 = CudaDevice("sm89", "NVIDIA L4")
HERE = EngineRuntime("trt", "10.9.0.34", L4)


@pytest.fixture
def bundle_with(tiny_bundle):
    """Makes the tiny bundle with one engine, as TensorRT 10.9 on an L4 builds it, after changes."""

    pristine = (tiny_bundle / "manifest.json").read_bytes()

    def write(**changes):
        (tiny_bundle / "manifest.json").write_bytes(pristine)
        return add_engine(tiny_bundle, CONTENT, **changes)

    return write


def test_an_engine_that_fits_is_given_out(bundle_with):
    bundle = bundle_with()
    assert check_engine(bundle.manifest, FILE, HERE, max_batch=8) == bundle.manifest.artifacts[1]


def test_an_engine_that_is_not_there_is_refused_with_those_that_are(bundle_with):
    with pytest.raises(BundleError, match=r"got no engine model\.onnx, wanted one of model\.fp32\.engine"):
        check_engine(bundle_with().manifest, "model.onnx", HERE, max_batch=8)


def test_an_engine_of_another_graph_than_the_bundle_has_is_refused(bundle_with):
    artifact = bundle_with().manifest.artifacts[1]
    stale = replace(artifact.engine, source_sha256="d" * 64)
    with pytest.raises(BundleError, match=f"got an engine of a graph with sha256 {'d' * 64}"):
        check_engine(bundle_with(engine=stale).manifest, FILE, HERE, max_batch=8)


@pytest.mark.parametrize("field", ["source_sha256", "cache_key"])
def test_a_manifest_whose_hash_of_an_engine_is_none_is_refused(bundle_with, field):
    artifact = bundle_with().manifest.artifacts[1]
    with pytest.raises(BundleError, match=rf"engine\.{field}: got 'abc', wanted 64 hexadecimal digits"):
        replace(artifact.engine, **{field: "abc"})


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (replace(HERE, flavour="rtx"), r"got an engine of tensorrt 10\.9\.0\.34, wanted one of flavour rtx"),
        (replace(HERE, version="10.9.0.35"), r"got an engine of version 10\.9\.0\.34, wanted .* 10\.9\.0\.35"),
        (replace(HERE, device=CudaDevice("sm86", "A10")), r"got an engine for sm89, wanted one for sm86 \(A10\)"),
        (replace(HERE, device=None), "got no GPU, wanted an NVIDIA GPU with its driver"),
    ],
)
def test_another_flavour_version_or_gpu_is_refused(bundle_with, here, reason):
    with pytest.raises(BackendError, match=f"{FILE}: {reason}") as caught:
        check_engine(bundle_with().manifest, FILE, here, max_batch=8)
    assert "export.trt --model BUNDLE --fp32" in caught.value.remedy or here.device is None


@pytest.mark.parametrize(
    ("version", "runs"),
    [("10.9.0.34", True), ("10.13.3.9", True), ("11.4.1", True), ("10.8.0.43", False), ("12.0", False)],
)
def test_a_version_compatible_engine_runs_on_newer_versions_up_to_the_next_major(bundle_with, version, runs):
    bundle = bundle_with(version_compatible=True)
    here = replace(HERE, version=version)
    if runs:
        assert check_engine(bundle.manifest, FILE, here, max_batch=2).file == FILE
    else:
        with pytest.raises(BackendError, match=r"of version 10\.9\.0\.34, version compatible"):
            check_engine(bundle.manifest, FILE, here, max_batch=2)


@pytest.mark.parametrize(("target", "runs"), [("sm80", True), ("sm120", True), ("sm75", False)])
def test_a_hardware_compatible_engine_runs_on_ampere_and_newer(bundle_with, target, runs):
    bundle = bundle_with(targets=("ampere-plus",))
    here = replace(HERE, device=CudaDevice(target, "some GPU"))
    if runs:
        assert check_engine(bundle.manifest, FILE, here, max_batch=2).file == FILE
    else:
        with pytest.raises(BackendError, match="got an engine for ampere-plus"):
            check_engine(bundle.manifest, FILE, here, max_batch=2)


def test_a_batch_outside_the_profile_is_refused_at_load_and_at_call(bundle_with):
    bundle = bundle_with()
    with pytest.raises(BackendError, match="got a batch of 9, wanted 2 to 8, its optimization profile"):
        check_engine(bundle.manifest, FILE, HERE, max_batch=9)
    artifact = bundle.manifest.artifacts[1]
    check_batch(artifact, 2)
    check_batch(artifact, 8)
    for pictures in (0, 1, 9):
        with pytest.raises(BackendError, match=f"got a batch of {pictures}, "):
            check_batch(artifact, pictures)
    with pytest.raises(BackendError, match="wanted a profile"):
        check_batch(replace(artifact, profile=None), 1)


class Runtime:
    """Of TensorRT, which says nothing about an engine that it cannot read."""

    engine_host_code_allowed = False

    def __init__(self, engine):
        self.engine = engine

    def deserialize_cuda_engine(self, content):
        return self.engine


class RtxRuntime(Runtime):
    """Of TensorRT-RTX, which answers with diagnostics as well."""

    def __init__(self, engine, diagnostics):
        super().__init__(engine)
        self.diagnostics = diagnostics

    def get_engine_validity(self, content):
        return ("INVALID", self.diagnostics)


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs the driver offers."""

    def put(count):
        monkeypatch.setattr("runtime.engine_check.cuda_driver", lambda: CudaDriver(count, "no NVIDIA driver"))

    put(1)
    return put


def test_an_engine_that_tensorrt_reads_is_given_out(bundle_with, gpus):
    artifact = bundle_with().manifest.artifacts[1]
    runtime = Runtime("engine")
    assert deserialized_engine(runtime, CONTENT, artifact) == "engine"
    assert not runtime.engine_host_code_allowed
    compatible = bundle_with(version_compatible=True).manifest.artifacts[1]
    assert deserialized_engine(runtime, CONTENT, compatible) == "engine"
    assert runtime.engine_host_code_allowed


def test_without_a_gpu_a_damaged_engine_and_the_missing_gpu_are_told_apart(bundle_with, gpus):
    gpus(0)
    artifact = bundle_with().manifest.artifacts[1]
    with pytest.raises(BackendError, match="got no NVIDIA driver, wanted an NVIDIA GPU"):
        deserialized_engine(RtxRuntime(None, 0), CONTENT, artifact)
    with pytest.raises(BundleError, match="got a file that is no engine"):
        deserialized_engine(RtxRuntime(None, 32), CONTENT, artifact)
    with pytest.raises(BackendError, match="got no NVIDIA driver, wanted an NVIDIA GPU"):
        deserialized_engine(Runtime(None), CONTENT, artifact)


@pytest.mark.parametrize(
    ("bits", "kind", "reason"),
    [(1, BackendError, "another version"), (2, BackendError, "other GPUs"), (6, BackendError, "other GPUs"),
     (16, BackendError, "too little memory"), (64, BackendError, "a CUDA error"), (33, BundleError, "no engine")],
)  # fmt: skip
def test_what_tensorrt_rtx_finds_wrong_is_said(bundle_with, gpus, bits, kind, reason):
    with pytest.raises(kind, match=reason):
        deserialized_engine(RtxRuntime(None, bits), CONTENT, bundle_with().manifest.artifacts[1])


def test_an_engine_that_tensorrt_cannot_read_on_a_gpu_is_a_damaged_file(bundle_with, gpus):
    with pytest.raises(BundleError, match="got a file that TensorRT cannot read, though there is a GPU"):
        deserialized_engine(Runtime(None), CONTENT, bundle_with().manifest.artifacts[1])


def test_the_real_tensorrt_rtx_tells_a_damaged_engine_from_a_missing_gpu(bundle_with, gpus):
    pytest.importorskip("tensorrt_rtx")
    from export.engine import EngineSettings, engine_from_onnx
    from export.engine_flavours import find_tensorrt
    from export.engine_log import recorded_messages

    gpus(0)
    tensorrt = find_tensorrt()
    engine = engine_from_onnx(
        tiny_graph(), ProfileSpec(1, 1, 2), tensorrt=tensorrt, label="tiny", settings=EngineSettings(target="sm89")
    )
    artifact = bundle_with().manifest.artifacts[1]
    with recorded_messages(tensorrt.module) as (log, _):
        runtime = tensorrt.module.Runtime(log)
        with pytest.raises(BackendError, match="got no NVIDIA driver"):
            deserialized_engine(runtime, engine.content, artifact)
        for damaged in (b"", b"an engine", bytes([engine.content[0] ^ 255]) + engine.content[1:]):
            with pytest.raises(BundleError, match="got a file that is no engine"):
                deserialized_engine(runtime, damaged, artifact)


def test_the_driver_is_asked_for_the_gpu_and_what_it_can(monkeypatch):
    class Driver:
        """libcuda with two devices, the second an L4."""

        broken = False

        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device, index):
            device._obj.value = 10 + index
            return 0

        def cuDeviceGetName(self, name, size, device):
            name.value = {10: b"Orin", 11: b"NVIDIA L4"}[device.value]
            return 0

        def cuDeviceGetAttribute(self, value, attribute, device):
            value._obj.value = {(75, 10): 8, (76, 10): 7, (75, 11): 8, (76, 11): 9}[attribute, device.value]
            return 999 if self.broken else 0

    monkeypatch.setattr("runtime.backends.cuda_driver.ctypes.CDLL", lambda name: Driver())
    assert cuda_device() == CudaDevice("sm87", "Orin")
    assert cuda_device(1) == L4
    assert cuda_device(2) is None
    monkeypatch.setattr(Driver, "broken", True)
    assert cuda_device() is None
