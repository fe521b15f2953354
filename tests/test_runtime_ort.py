"""ONNX Runtime's providers for GPUs: on stand-ins, what they are told, and that nothing else is taken for them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images, tiny_graph, write_bundle
from test_runtime_backends import _pretended_onnxruntime

from runtime.backends import open_backend, probe_backend
from runtime.backends.cuda_driver import CudaDriver
from runtime.backends.ort import OrtBackend
from runtime.errors import BackendError

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("ort") / "m", precisions=("fp32", "fp16", "int8"))


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Puts an onnxruntime with every provider in place, whose sessions end up on the given one."""
    monkeypatch.setattr("runtime.backends.ort.cuda_driver", lambda: CudaDriver(1, "pretended"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")

    def put(session_provider=None, **options):
        module = _pretended_onnxruntime(
            available=[*PROVIDERS.values(), "CPUExecutionProvider"], session_providers=[session_provider], **options
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        return module.InferenceSession

    return put


@pytest.mark.parametrize(("name", "provider"), PROVIDERS.items())
def test_a_session_that_ended_up_elsewhere_is_refused(manifest, pretend, name, provider):
    pretend("CPUExecutionProvider")
    with pytest.raises(BackendError, match=f"got a session on CPUExecutionProvider, wanted {provider}"):
        open_backend(name, tiny_graph(), manifest, file="model.fp32.onnx")
    assert not probe_backend(name).runs


@pytest.mark.parametrize(("name", "provider"), PROVIDERS.items())
def test_a_provider_is_probed_by_running_a_graph_on_it_alone(pretend, name, provider):
    session = pretend(provider)
    probe = probe_backend(name)
    assert (probe.runs, probe.device, probe.reason) == (True, "cuda:0", f"{provider} ran a graph")
    entries, providers = session.opened
    assert entries == {"session.disable_cpu_ep_fallback": "1"}
    assert [told for told, _ in providers] == [provider]


@pytest.mark.parametrize(("name", "provider"), PROVIDERS.items())
def test_a_provider_that_lacks_a_node_or_a_library_is_refused(manifest, pretend, name, provider):
    pretend(open_error="nodes on the default CPU EP, but fallback to CPU EP has been explicitly disabled by the user")
    short = provider.removesuffix("ExecutionProvider")
    with pytest.raises(BackendError, match=f"got {short} libraries that do not load, or a graph of which {short}"):
        open_backend(name, tiny_graph(), manifest, file="model.fp32.onnx")


@pytest.mark.parametrize(("name", "prefix"), [("onnxruntime-tensorrt", "trt"), ("onnxruntime-tensorrt-rtx", "nv")])
def test_a_tensorrt_provider_is_told_its_batches_and_where_to_keep_what_it_builds(
    manifest, pretend, tmp_path, name, prefix
):
    session = pretend(open_error="stop here")
    folders = set()
    for graph in (tiny_graph(), tiny_graph(offset=1.0)):
        with pytest.raises(BackendError, match="stop here"):
            open_backend(name, graph, manifest, file="model.fp32.onnx")
        ((_, told),) = session.opened[1]
        assert [told[f"{prefix}_profile_{which}_shapes"] for which in ("min", "opt", "max")] == [
            "images:1x16x16x3", "images:8x16x16x3", "images:64x16x16x3",
        ]  # fmt: skip
        folders.add(told["trt_engine_cache_path" if prefix == "trt" else "nv_runtime_cache_path"])
    # An engine of one graph is never taken for another.
    assert len(folders) == 2
    assert all(folder.startswith(str(tmp_path / "cache" / "ntf-toolkit" / name)) for folder in folders)


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [("fp32", set()), ("fp16", {"trt_fp16_enable"}), ("int8", {"trt_int8_enable", "trt_fp16_enable"})],
)
def test_a_weakly_typed_tensorrt_is_allowed_the_types_of_its_graph_and_no_others(manifest, pretend, precision, allowed):
    session = pretend(open_error="stop here")
    with pytest.raises(BackendError):
        open_backend("onnxruntime-tensorrt", tiny_graph(), manifest, file=f"model.{precision}.onnx")
    ((_, told),) = session.opened[1]
    assert {key for key in told if key in ("trt_fp16_enable", "trt_int8_enable")} == allowed


def test_cuda_is_told_to_multiply_in_full(manifest, pretend):
    session = pretend(open_error="stop here")
    with pytest.raises(BackendError, match="stop here"):
        open_backend("onnxruntime-cuda", tiny_graph(), manifest, file="model.fp32.onnx")
    assert session.opened[1] == [("CUDAExecutionProvider", {"use_tf32": "0"})]


@pytest.mark.parametrize("value", [None, "1"])
@pytest.mark.parametrize("name", ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_a_tensorrt_provider_that_would_multiply_in_tf32_is_refused(manifest, pretend, monkeypatch, name, value):
    session = pretend(PROVIDERS[name])
    if value is None:
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    else:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    with pytest.raises(BackendError, match=rf"NVIDIA_TF32_OVERRIDE = {value}, .*wanted NVIDIA_TF32_OVERRIDE=0"):
        open_backend(name, tiny_graph(), manifest, file="model.fp32.onnx")
    assert session.opened is None
    probe = probe_backend(name)
    assert (probe.runs, probe.install) == (
        False, "set it before the program starts, or choose onnxruntime-cuda or trt",
    )  # fmt: skip


@pytest.fixture
def bound(manifest):
    """A CPU session that is used as one on a GPU is: by IO binding."""
    backend = OrtBackend(tiny_graph(), manifest, file="model.fp32.onnx", threads=1)
    backend.name = "onnxruntime-tensorrt"
    yield backend
    backend.close()


@pytest.mark.parametrize("images", [random_images(1), random_images(33), random_images(6)[::-2]])
def test_io_binding_gives_the_outputs_of_the_graph_whatever_the_strides(bound, images):
    outputs = bound.infer(images)
    kept = outputs.logits.copy()
    for output, expected in numpy_outputs(images).items():
        np.testing.assert_allclose(getattr(outputs, output), expected, atol=2e-6, rtol=0)
    bound.infer(random_images(len(images), seed=9))
    np.testing.assert_array_equal(outputs.logits, kept)


def test_a_batch_that_the_engine_was_not_built_for_is_refused_at_load_and_at_call(bound, manifest):
    with pytest.raises(BackendError, match="got a batch of 65, wanted 1 to 64"):
        bound.infer(random_images(65))
    with pytest.raises(BackendError, match="got a batch of 65, wanted 1 to 64"):
        open_backend("onnxruntime-tensorrt", tiny_graph(), manifest, file="model.fp32.onnx", max_batch=65)


def test_an_inference_that_fails_is_a_named_error(bound):
    bound._manifest = replace(bound._manifest, evidence_shape=(3, 3))
    with pytest.raises(BackendError, match="back-end onnxruntime-tensorrt: got an inference that failed"):
        bound.infer(random_images(2))
