"""What an engine can be built for, and the reason where it cannot."""

from __future__ import annotations

import types

import pytest

from export.engine_flavours import FLAVOURS, TensorRT
from export.engine_targets import resolve_target, set_capabilities
from export.errors import ExportError
from runtime.backends.cuda_driver import CudaDevice

RTX_CAPABILITIES = ("NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
ALL = ("sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.fixture
def rtx():
    members = {name: index for index, name in enumerate(RTX_CAPABILITIES)}
    module = types.SimpleNamespace(ComputeCapability=types.SimpleNamespace(__members__=members))
    return TensorRT(module, FLAVOURS[-1], "1.7")


@pytest.fixture
def trt():
    return TensorRT(None, FLAVOURS[0], "10.9")


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU into this machine, or takes it out."""

    def put(device):
        monkeypatch.setattr("export.engine_targets.cuda_device", lambda: device)

    put(None)
    return put


def test_the_capabilities_are_those_of_the_installed_module():
    module = pytest.importorskip("tensorrt_rtx")
    assert tuple(module.ComputeCapability.__members__) == RTX_CAPABILITIES


def test_without_a_gpu_tensorrt_rtx_builds_for_every_gpu_that_it_knows(rtx, gpu):
    for asked in (None, "portable", "PORTABLE"):
        target = resolve_target(rtx, asked)
        assert (target.name, target.capabilities, target.gpu, target.note) == ("portable", ALL, None, "")


def test_named_targets_are_sorted_and_counted_once(rtx, gpu):
    target = resolve_target(rtx, "sm120, SM80,sm120")
    assert (target.name, target.capabilities) == ("sm80-sm120", ("sm80", "sm120"))
    assert resolve_target(rtx, "sm89").name == "sm89"


def test_this_gpu_is_taken_where_there_is_one(rtx, gpu):
    gpu(CudaDevice("sm89", "NVIDIA L4"))
    assert resolve_target(rtx, None).capabilities == ("sm89",)
    assert resolve_target(rtx, "this-gpu,sm80").capabilities == ("sm80", "sm89")


def test_a_gpu_that_tensorrt_rtx_cannot_build_for_is_said_and_refused_when_it_is_asked_for(rtx, gpu):
    gpu(CudaDevice("sm90", "NVIDIA H100"))
    target = resolve_target(rtx, None)
    assert target.capabilities == ALL
    assert target.note == "no engine of tensorrt_rtx 1.7 runs on this GPU, sm90 (NVIDIA H100)"
    with pytest.raises(ExportError, match=r"--target sm90: got .*its targets are sm80, .*tensorrt on a GPU"):
        resolve_target(rtx, "this-gpu")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("sm75", "Turing has no FP32 matrix product in it, .*: use tensorrt on that GPU"),
        ("sm80,sm75", "--target sm75: got .*Turing"),
        ("sm87", "sm87 is a Jetson, and its targets are sm80, .*: use the tensorrt of JetPack on the Jetson"),
        ("sm100", "its targets are sm80, sm86, sm89, sm120, sm121, .*: use tensorrt on a GPU of sm100"),
        ("8.9", "that is no compute capability; .*: write sm89, sm80,sm89, portable or this-gpu"),
        ("current", "that is no compute capability"),
        ("", "that is no compute capability"),
        ("portable,sm89", "portable is every target already"),
        ("this-gpu", "there is no GPU here, .*: name its compute capability, or use --target portable"),
    ],
)
def test_a_target_that_tensorrt_rtx_does_not_have_is_refused_with_the_reason(rtx, gpu, asked, reason):
    with pytest.raises(ExportError, match=reason):
        resolve_target(rtx, asked)


def test_tensorrt_builds_for_the_gpu_it_runs_on(trt, gpu):
    gpu(CudaDevice("sm87", "Orin"))
    for asked in (None, "this-gpu", "sm87"):
        target = resolve_target(trt, asked)
        assert (target.name, target.capabilities, target.gpu) == ("sm87", ("sm87",), "Orin")


@pytest.mark.parametrize("asked", ["sm89", "portable", "sm87,sm89"])
def test_tensorrt_refuses_another_gpu_than_its_own(trt, gpu, asked):
    gpu(CudaDevice("sm87", "Orin"))
    with pytest.raises(ExportError, match=rf"--target {asked}: got .*which is sm87 \(Orin\), .*--hardware-compatible"):
        resolve_target(trt, asked)


def test_tensorrt_needs_a_gpu(trt, gpu):
    with pytest.raises(ExportError, match="it builds on a GPU only, and there is none here"):
        resolve_target(trt, None)


def test_a_hardware_compatible_engine_is_for_ampere_and_newer(trt, gpu):
    gpu(CudaDevice("sm89", "NVIDIA L4"))
    target = resolve_target(trt, None, hardware_compatible=True)
    assert (target.name, target.capabilities, target.gpu) == ("ampere-plus", ("ampere-plus",), "NVIDIA L4")
    gpu(CudaDevice("sm75", "Tesla T4"))
    with pytest.raises(ExportError, match=r"--target ampere-plus: got .*this GPU is sm75"):
        resolve_target(trt, None, hardware_compatible=True)


def test_the_configuration_of_tensorrt_rtx_is_told_its_targets(rtx, trt, gpu):
    class Config:
        def __init__(self):
            self.told = {}

        def set_compute_capability(self, capability, index):
            self.told[index] = capability

    config = Config()
    set_capabilities(rtx, config, resolve_target(rtx, "sm80,sm89"))
    assert config.num_compute_capabilities == 2
    assert config.told == {0: RTX_CAPABILITIES.index("SM80"), 1: RTX_CAPABILITIES.index("SM89")}
    untouched = Config()
    gpu(CudaDevice("sm89", "NVIDIA L4"))
    set_capabilities(trt, untouched, resolve_target(trt, None))
    assert not untouched.told
