from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
from bundle_fixtures import numpy_outputs, parity, random_images, tiny_graph, write_bundle
from onnx import TensorProto, helper

from runtime.backends import BACKENDS, Probe, open_backend, probe_backend
from runtime.backends.choice import choose, parity_passed
from runtime.backends.cuda_driver import CudaDriver
from runtime.backends.ort import RELU_GRAPH
from runtime.bundle import open_bundle
from runtime.errors import BackendError, BundleError

CPU_BACKENDS = ("onnxruntime", "openvino")
# Largest differences from float64 NumPy that were measured on 64 noise pictures: 2e-7 in every output.
TOLERANCE = 2e-6


@pytest.fixture
def manifest(tmp_path):
    return write_bundle(tmp_path / "m")


def _open(name, manifest, graph=None, **options):
    return open_backend(name, graph or tiny_graph(), manifest, file="model.onnx", **options)


def _runnable(*names):
    """Stands in for `probe_backend`: just these run."""

    def probe(name):
        return Probe(name, name in names, None, None, "pretended", "" if name in names else "pip install it")

    return probe


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("pictures", [1, 2, 33])
def test_backend_agrees_with_numpy(manifest, name, pictures):
    backend = _open(name, manifest, threads=1)
    images = random_images(pictures)
    outputs = backend.infer(images)
    for output, expected in numpy_outputs(images).items():
        found = getattr(outputs, output)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    assert (backend.name, backend.device) == (name, "cpu")
    backend.close()


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_outputs_of_one_call_survive_the_next(manifest, name):
    backend = _open(name, manifest)
    first = backend.infer(random_images(2, seed=1)).logits
    kept = first.copy()
    backend.infer(random_images(2, seed=2))
    np.testing.assert_array_equal(first, kept)
    backend.close()


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"rename": {"images": "pixels"}}, "inputs: got pixels, wanted images"),
        ({"rename": {"logits": "scores"}}, "outputs: got .*, wanted logits, trace_similarity"),
        ({"input_type": TensorProto.FLOAT}, "inputs: got images float32"),
        ({"batch": 1}, r"inputs: got images uint8 \(1, 16, 16, 3\), wanted images uint8 \(N, 16, 16, 3\)"),
    ],
)
def test_graph_that_breaks_the_contract_is_refused(manifest, name, broken, message):
    with pytest.raises(BundleError, match=message):
        _open(name, manifest, tiny_graph(**broken))


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_graph_of_another_size_than_the_manifest_says_is_refused(tmp_path, name):
    other = write_bundle(tmp_path / "other", evidence_shape=(5, 4))
    with pytest.raises(BundleError, match=r"outputs: got evidence .*, wanted evidence float32 \(N, 5, 4\)"):
        _open(name, other)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_graph_with_nothing_in_it_is_refused(manifest, name):
    with pytest.raises(BackendError, match=f"back-end {name}: got a graph that it cannot open"):
        _open(name, manifest, b"\x08\x08")  # says its version of ONNX, and no more


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("data", [b"garbage", tiny_graph()[:500]])
def test_file_that_is_no_graph_is_refused(manifest, name, data):
    with pytest.raises(BundleError, match=r"model\.onnx: got a file that is no ONNX graph"):
        _open(name, manifest, data)


CLOSED_IN_THE_ORDER_OF_OPENING = """
import os, signal, sys
from runtime.backends import open_backend, probe_backend
from runtime.bundle import open_bundle

bundle = open_bundle(sys.argv[1])
artifact = bundle.manifest.onnx_artifact("fp32")
opened = [open_backend(sys.argv[2], bundle.read(artifact), bundle.manifest, file=artifact.file) for _ in range(3)]
assert probe_backend(sys.argv[2]).runs
while opened:
    opened.pop(0).close()
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_signals_are_handled_after_graphs_were_closed_in_the_order_of_opening(tmp_path, name):
    """As when a server swaps bundles; OpenVINO would leave the thread a signal stack that it freed."""
    path = tmp_path / "model"
    write_bundle(path)
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED_IN_THE_ORDER_OF_OPENING, path, name], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_unknown_backend_is_refused_with_the_known_ones(manifest):
    with pytest.raises(BackendError, match="got 'tpu', wanted auto or one of trt, onnxruntime-cuda, onnx"):
        _open("tpu", manifest)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_missing_package_says_what_to_install(manifest, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf'no package {name}.*pip install "ntf-toolkit\[cpu\]"'):
        _open(name, manifest)
    probe = probe_backend(name)
    assert not probe.runs
    assert probe.install == 'pip install "ntf-toolkit[cpu]"'


def test_cpu_backends_probe_as_running():
    for name in CPU_BACKENDS:
        probe = probe_backend(name)
        assert (probe.runs, probe.device, probe.install) == (True, "cpu", "")
        assert probe.version


# CUDA: what can be shown without a GPU is that nothing else is ever taken for it.


def _pretended_onnxruntime(*, available, session_providers=None, open_error=None):
    """Module that answers as onnxruntime-gpu does; it falls back to the CPU when told to."""
    module = types.ModuleType("onnxruntime")
    module.__version__ = "0"

    class SessionOptions:
        def __init__(self):
            self.entries = {}

        def add_session_config_entry(self, key, value):
            self.entries[key] = value

    class InferenceSession:
        opened = None

        def __init__(self, model, options, providers):
            InferenceSession.opened = (options.entries, providers)
            if open_error:
                raise RuntimeError(open_error)

        def get_providers(self):
            return session_providers

        def run(self, outputs, feeds):
            return [feeds["x"]]

    module.SessionOptions, module.InferenceSession = SessionOptions, InferenceSession
    module.get_available_providers = lambda: available
    return module


@pytest.fixture
def _pretended_gpu(monkeypatch):
    monkeypatch.setattr("runtime.backends.ort.cuda_driver", lambda: CudaDriver(1, "pretended"))


@pytest.mark.usefixtures("_pretended_gpu")
def test_cuda_that_falls_back_to_the_cpu_is_refused(manifest, monkeypatch):
    pretended = _pretended_onnxruntime(
        available=["CUDAExecutionProvider", "CPUExecutionProvider"], session_providers=["CPUExecutionProvider"]
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", pretended)
    with pytest.raises(BackendError, match="got a session on CPUExecutionProvider, wanted CUDAExecutionProvider"):
        _open("onnxruntime-cuda", manifest)
    assert not probe_backend("onnxruntime-cuda").runs


@pytest.mark.usefixtures("_pretended_gpu")
def test_cuda_session_is_opened_with_the_fallback_disabled(manifest, monkeypatch):
    pretended = _pretended_onnxruntime(
        available=["CUDAExecutionProvider"], open_error="no CUDA-capable device\nlong tail"
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", pretended)
    with pytest.raises(BackendError, match=r"cannot open \(no CUDA-capable device\)"):
        _open("onnxruntime-cuda", manifest)
    entries, providers = pretended.InferenceSession.opened
    assert entries == {"session.disable_cpu_ep_fallback": "1"}
    assert [name for name, _ in providers] == ["CUDAExecutionProvider"]


@pytest.mark.usefixtures("_pretended_gpu")
def test_cuda_whose_libraries_do_not_load_says_what_to_install(manifest, monkeypatch):
    message = "nodes that are assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled"
    pretended = _pretended_onnxruntime(available=["CUDAExecutionProvider"], open_error=message)
    monkeypatch.setitem(sys.modules, "onnxruntime", pretended)
    with pytest.raises(BackendError, match=r"libraries that do not load.*onnxruntime-gpu\[cuda,cudnn\]"):
        _open("onnxruntime-cuda", manifest)


def test_cuda_is_not_even_tried_where_the_driver_sees_no_device(manifest, monkeypatch):
    pretended = _pretended_onnxruntime(available=["CUDAExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", pretended)
    monkeypatch.setattr("runtime.backends.ort.cuda_driver", lambda: CudaDriver(0, "no NVIDIA driver"))
    with pytest.raises(BackendError, match="got no NVIDIA driver, wanted an NVIDIA GPU"):
        _open("onnxruntime-cuda", manifest)
    assert pretended.InferenceSession.opened is None
    assert probe_backend("onnxruntime-cuda").reason == "no NVIDIA driver"


def test_cuda_in_a_cpu_build_is_refused(manifest, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", _pretended_onnxruntime(available=["CPUExecutionProvider"]))
    with pytest.raises(BackendError, match="built without CUDA"):
        _open("onnxruntime-cuda", manifest)


@pytest.mark.usefixtures("_pretended_gpu")
def test_cuda_probe_runs_when_the_session_really_is_on_cuda(monkeypatch):
    pretended = _pretended_onnxruntime(
        available=["CUDAExecutionProvider"], session_providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", pretended)
    probe = probe_backend("onnxruntime-cuda")
    assert (probe.runs, probe.device) == (True, "cuda:0")


def test_probe_graph_is_the_one_relu_it_says():
    model = onnx.load_from_string(RELU_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    assert model.graph == graph


# What "auto" takes


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        (BACKENDS, ("onnxruntime-cuda", "fp16")),
        (("openvino", "onnxruntime"), ("onnxruntime", "fp32")),
        (("openvino",), ("openvino", "fp32")),
    ],
)
def test_auto_takes_the_documented_preference(tmp_path, monkeypatch, running, expected):
    proven = {"fp16": [parity()], "int8": [parity()]}
    manifest = write_bundle(tmp_path / "m", precisions=("fp32", "fp16", "int8"), parities=proven)
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable(*running))
    choice = choose(manifest, backend="auto", precision="auto")
    assert (choice.backend, choice.artifact.precision) == expected


@pytest.mark.parametrize(
    "records",
    [
        [],
        [parity(passed=False)],
        [parity(), parity(passed=False)],
        [parity(backend="onnxruntime"), parity(backend="onnxruntime-cuda", passed=False)],
    ],
)
def test_fp16_without_passed_parity_is_not_taken_by_itself(tmp_path, monkeypatch, records):
    manifest = write_bundle(tmp_path / "m", precisions=("fp32", "fp16"), parities={"fp16": records})
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable("onnxruntime-cuda"))
    choice = choose(manifest, backend="auto", precision="auto")
    assert choice.artifact.precision == "fp32"
    assert "fp16 has no passed parity check" in choice.reason


def test_parity_on_the_backend_itself_counts_before_that_of_others(tmp_path):
    records = [parity(backend="onnxruntime", passed=False), parity(backend="openvino")]
    artifact = write_bundle(tmp_path / "m", parities={"fp32": records}).artifacts[0]
    assert parity_passed(artifact, "openvino")
    assert not parity_passed(artifact, "onnxruntime")
    assert not parity_passed(artifact, "onnxruntime-cuda")


def test_named_precision_is_taken_whatever_its_parity(tmp_path, monkeypatch):
    manifest = write_bundle(tmp_path / "m", precisions=("fp32", "int8"), parities={"int8": [parity(passed=False)]})
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable("onnxruntime"))
    assert choose(manifest, backend="auto", precision="int8").artifact.precision == "int8"


def test_bundle_with_unproven_int8_alone_needs_the_precision_named(tmp_path, monkeypatch):
    manifest = write_bundle(tmp_path / "m", precisions=("int8",))
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable("openvino"))
    with pytest.raises(BackendError, match="these ONNX precisions: int8, wanted an ONNX graph that is FP32 or"):
        choose(manifest, backend="auto", precision="auto")


@pytest.mark.parametrize(
    ("precision", "message"),
    [("int8", "got a bundle with these ONNX precisions: fp32"), ("int4", "wanted auto or one of fp32, fp16, int8")],
)
def test_precision_that_is_not_there_is_refused(manifest, precision, message):
    with pytest.raises(BackendError, match=message):
        choose(manifest, backend="onnxruntime", precision=precision)


def test_named_backend_that_does_not_run_is_refused_with_those_that_do(manifest, monkeypatch):
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable("onnxruntime"))
    with pytest.raises(BackendError, match=r"that runs here \(onnxruntime\): pip install it"):
        choose(manifest, backend="openvino", precision="auto")


def test_no_backend_at_all_says_what_to_install(manifest, monkeypatch):
    monkeypatch.setattr("runtime.backends.choice.probe_backend", _runnable())
    with pytest.raises(BackendError, match=r'none that runs here .*pip install "ntf-toolkit\[cpu\]"'):
        choose(manifest, backend="auto", precision="auto")


def test_only_engines_in_a_bundle_is_said_honestly(tmp_path):
    from dataclasses import replace

    manifest = write_bundle(tmp_path / "m")
    engine = replace(
        manifest.artifacts[0], file="model.engine", format="engine", opset=None, flavour="rtx", targets=("sm89",)
    )
    (tmp_path / "m" / "model.engine").write_bytes((tmp_path / "m" / "model.fp32.onnx").read_bytes())
    engines = write_bundle(tmp_path / "m", artifacts=(engine,))
    assert open_bundle(tmp_path / "m").manifest == engines
    with pytest.raises(BackendError, match=r"none; 1 engine\(s\), which the back-end trt runs"):
        choose(engines, backend="onnxruntime", precision="auto")
