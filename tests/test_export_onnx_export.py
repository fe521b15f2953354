"""The FP32 graph: contract, folded batch norms, parity, and the same bytes everywhere."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported import ENCODERS, detector, fp32_graph, images, run_graph
from onnx import TensorProto, numpy_helper

from export.errors import ExportError
from export.graph import consumers, copy_of, initializers, insert_nodes, model_bytes, output_names, store
from export.onnx_export import (
    OPSET,
    PARITY_LIMIT,
    check_contract,
    check_parity,
    onnx_from_model,
    torch_outputs,
)
from runtime.manifest import INPUT_NAME, OUTPUTS


@pytest.mark.parametrize("encoder", ENCODERS)
def test_graph_gives_what_pytorch_gives(encoder):
    ours = run_graph(fp32_graph(encoder), images())
    for name, theirs in zip(OUTPUTS, torch_outputs(detector(encoder), images()), strict=True):
        # Measured: 2e-7 on unit rows; the classifier of the tiny detectors multiplies that by some hundreds.
        tolerance = 1e-3 if name in ("logits", "evidence") else 2e-6
        np.testing.assert_allclose(ours[name], theirs, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_batch_norms_are_folded_and_cast_reads_the_input_alone(encoder):
    model = fp32_graph(encoder)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [node.op_type for node in consumers(model)[INPUT_NAME]] == ["Cast"]


def test_input_is_bytes_with_a_free_batch_and_outputs_are_float32_in_order():
    model = fp32_graph("test_resnet")
    (images_info,) = model.graph.input
    assert images_info.type.tensor_type.elem_type == TensorProto.UINT8
    assert images_info.type.tensor_type.shape.dim[0].dim_param
    assert output_names(model) == list(OUTPUTS)
    assert {o.type.tensor_type.elem_type for o in model.graph.output} == {TensorProto.FLOAT}
    assert max(o.version for o in model.opset_import) == OPSET <= 20


def test_nodes_are_named_after_their_layers():
    names = {node.name for node in fp32_graph("test_efficientnet").graph.node}
    assert {"projection.0", "classifier", "encoder.net.conv_stem"} <= names
    assert len(names) == len(fp32_graph("test_efficientnet").graph.node)


def test_head_weights_are_stored_once():
    stored = initializers(fp32_graph("test_resnet"))
    width = detector("test_resnet").encoder.width
    assert [name for name, t in stored.items() if sorted(t.dims) == [width, width]] == ["projection.0.weight"]


def test_the_file_names_nothing_of_the_machine_that_made_it():
    model = copy_of(fp32_graph("test_resnet"))
    del model.graph.initializer[:]
    for trace in (b".py", b"stack_trace", b"NTFDetector", b"+cu", str(Path.home()).encode(), str(Path.cwd()).encode()):
        assert trace not in model_bytes(model)
    model = fp32_graph("test_resnet")
    assert not model.metadata_props
    assert not any(part.metadata_props or part.doc_string for part in (*model.graph.node, *model.graph.input))


def test_training_mode_is_refused():
    training = copy.deepcopy(detector("test_resnet")).train()
    with pytest.raises(ExportError, match="training mode"):
        onnx_from_model(training)


def test_a_changed_weight_fails_the_parity_check():
    model = copy_of(fp32_graph("test_resnet"))
    store(model, "classifier.bias", numpy_helper.to_array(initializers(model)["classifier.bias"]) + np.float32(0.1))
    with pytest.raises(ExportError, match=r"against PyTorch: got outputs that differ by"):
        check_parity(model, detector("test_resnet"))
    assert check_parity(fp32_graph("test_resnet"), detector("test_resnet")) < PARITY_LIMIT


def test_a_batch_norm_left_in_the_graph_is_refused():
    model = copy_of(fp32_graph("test_resnet"))
    pool = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    channels = detector("test_resnet").encoder.width
    ones = [store(model, f"norm.{part}", np.ones(channels, np.float32)) for part in ("scale", "bias", "mean", "var")]
    norm = onnx.helper.make_node("BatchNormalization", [pool.input[0], *ones], ["normed"], name="norm")
    pool.input[0] = "normed"
    insert_nodes(model, [norm])
    with pytest.raises(ExportError, match="batch norms folded"):
        check_contract(model, input_size=(160, 160))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda m: m.graph.output.reverse(), "outputs logits"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 2), "uint8 .N, H, W, 3."),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused_by_rule(change, rule):
    model = copy_of(fp32_graph("test_resnet"))
    change(model)
    with pytest.raises(ExportError, match=rule):
        check_contract(model, input_size=(160, 160))


def test_the_input_size_is_part_of_the_contract():
    with pytest.raises(ExportError, match="input images uint8"):
        check_contract(fp32_graph("test_resnet"), input_size=(224, 224))
