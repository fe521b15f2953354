"""Engines: real ones from TensorRT-RTX, which builds without a GPU, and what is refused with a reason."""

from __future__ import annotations

import sys

import pytest
from exported import graphs
from rich.progress import Progress

from export.engine import EngineLayer, TensorRT, engine_from_onnx, find_tensorrt, read_layers
from export.errors import ExportError
from export.graph import copy_of, model_bytes
from runtime.errors import BackendError, BundleError
from runtime.manifest import ProfileSpec

PROFILE = ProfileSpec(1, 2, 4)


@pytest.fixture
def tensorrt():
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx here")
    return find_tensorrt()


def types_of(engine):
    return {
        name for layer in engine.layers for name in (*layer.input_types, *layer.constant_types, *layer.output_types)
    }


@pytest.mark.parametrize(
    ("precision", "weights"), [("fp32", "Float"), ("fp16", "Half"), ("int8", "Int8"), ("int8+fp16", "Int8")]
)
def test_a_real_engine_is_built_and_its_weights_have_the_type_asked_for(tensorrt, precision, weights):
    engine = engine_from_onnx(
        model_bytes(graphs("test_resnet")[precision]), PROFILE, tensorrt=tensorrt, label=precision
    )
    assert len(engine.content) > 100_000
    assert len(engine.layers) > 20
    assert (engine.profile, engine.builder) == (PROFILE, tensorrt.builder)
    assert engine.targets
    assert weights in {name for layer in engine.layers for name in layer.constant_types}
    assert "UInt8" in {name for layer in engine.layers for name in layer.input_types}
    assert ("Int8" in types_of(engine)) == precision.startswith("int8")
    assert ("Half" in types_of(engine)) == (precision in ("fp16", "int8+fp16"))


def test_progress_shows_the_phases_and_is_cleared(tensorrt):
    seen = []

    class Watched(Progress):
        def add_task(self, description, **settings):
            seen.append(description)
            return super().add_task(description, **settings)

    with Watched(disable=True) as progress:
        engine_from_onnx(
            model_bytes(graphs("test_resnet")["fp32"]), PROFILE, tensorrt=tensorrt, label="demo", progress=progress
        )
        assert seen
        assert all(text.startswith("demo: ") for text in seen)
        assert not progress.tasks


@pytest.mark.parametrize("content", [b"", b"not an ONNX file"])
def test_a_file_that_is_no_graph_is_refused(tensorrt, content):
    with pytest.raises(ExportError, match=r"TensorRT engine demo: got .*, wanted (an ONNX graph|a network with input)"):
        engine_from_onnx(content, PROFILE, tensorrt=tensorrt, label="demo")


def test_a_graph_without_the_outputs_of_the_contract_is_refused(tensorrt):
    model = copy_of(graphs("test_resnet")["fp32"])
    del model.graph.output[1:]
    with pytest.raises(ExportError, match="outputs logits, trace_similarity, embeddings, evidence"):
        engine_from_onnx(model_bytes(model), PROFILE, tensorrt=tensorrt, label="demo")


def test_a_build_that_fails_is_an_error_with_tensorrts_own_reason(tensorrt, monkeypatch):
    monkeypatch.setattr("export.engine._set_targets", _ask_for_turing)
    with pytest.raises(ExportError, match=r"TensorRT engine demo: got .*SM75"):
        engine_from_onnx(model_bytes(graphs("test_resnet")["fp32"]), PROFILE, tensorrt=tensorrt, label="demo")


def _ask_for_turing(tensorrt, config):
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt.module.ComputeCapability.SM75, 0)
    return "sm75", ("sm75",)


def test_a_profile_whose_smallest_batch_is_above_its_largest_is_refused():
    with pytest.raises(BundleError, match="min_batch <= opt_batch <= max_batch"):
        ProfileSpec(8, 4, 2)


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"no module that imports .*pip install \"ntf-toolkit\[rtx\]\""):
        find_tensorrt()


def test_a_stub_of_tensorrt_is_passed_over(monkeypatch):
    class Stub:
        pass

    class Working:
        __version__ = "9.9"
        __name__ = "tensorrt_rtx"

    monkeypatch.setitem(sys.modules, "tensorrt", Stub())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Working())
    found = find_tensorrt()
    assert (found.flavour, found.version, found.builder) == ("rtx", "9.9", "tensorrt_rtx 9.9")


def test_layers_are_read_from_the_last_plan_of_the_log():
    plan = (
        "Layers:\n"
        "Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: x, Datatype: Half } ], "
        "Constants: [ { Name: w, Datatype: Int8 } ], Outputs: [ { Name: y, Datatype: Float } ], TacticName: t\n"
    )
    messages = [("VERBOSE", "Layers:\n"), ("ERROR", "other"), ("VERBOSE", plan)]
    assert read_layers(messages) == (EngineLayer("conv", "CaskConvolution", ("Half",), ("Int8",), ("Float",)),)


def test_networks_of_tensorrt_11_are_made_without_a_flag():
    flags = []

    class Parser:
        num_errors = 0

        def __init__(self, network, log):
            pass

        def parse(self, model):
            return False

    class Builder:
        def create_network(self, flag):
            flags.append(flag)

    module = type("tensorrt", (), {"NetworkDefinitionCreationFlag": object, "OnnxParser": Parser})
    from export.engine import _parse

    with pytest.raises(ExportError, match="a file it cannot parse"):
        _parse(TensorRT(module, "trt", "11").module, Builder(), None, b"", [], "demo")
    assert flags == [0]
