"""Engines: real ones from TensorRT-RTX, which builds without a GPU, and what is refused with a reason."""

from __future__ import annotations

import pytest
from exported import graphs

from export.engine import EngineSettings, engine_from_onnx
from export.engine_flavours import find_tensorrt
from export.errors import ExportError
from export.graph import copy_of, model_bytes
from runtime.errors import BundleError
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
    assert len(engine.target.capabilities) > 1
    assert weights in {name for layer in engine.layers for name in layer.constant_types}
    assert "UInt8" in {name for layer in engine.layers for name in layer.input_types}
    assert ("Int8" in types_of(engine)) == precision.startswith("int8")
    assert ("Half" in types_of(engine)) == (precision in ("fp16", "int8+fp16"))


@pytest.mark.parametrize("content", [b"", b"not an ONNX file"])
def test_a_file_that_is_no_graph_is_refused(tensorrt, content):
    with pytest.raises(ExportError, match=r"TensorRT engine demo: got .*, wanted (an ONNX graph|a network with input)"):
        engine_from_onnx(content, PROFILE, tensorrt=tensorrt, label="demo")


def test_a_graph_without_the_outputs_of_the_contract_is_refused(tensorrt):
    model = copy_of(graphs("test_resnet")["fp32"])
    del model.graph.output[1:]
    with pytest.raises(ExportError, match="outputs logits, trace_similarity, embeddings, evidence"):
        engine_from_onnx(model_bytes(model), PROFILE, tensorrt=tensorrt, label="demo")


def test_a_build_that_fails_is_an_error_with_tensorrts_own_reason(tensorrt):
    tight = EngineSettings(target="sm89", workspace_mib=1)
    with pytest.raises(ExportError, match=r"TensorRT engine demo: got .*no tactics .* within workspace limit"):
        engine_from_onnx(
            model_bytes(graphs("test_resnet")["fp32"]), PROFILE, tensorrt=tensorrt, label="demo", settings=tight
        )


def test_a_profile_whose_smallest_batch_is_above_its_largest_is_refused():
    with pytest.raises(BundleError, match="min_batch <= opt_batch <= max_batch"):
        ProfileSpec(8, 4, 2)
