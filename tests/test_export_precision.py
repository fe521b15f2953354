"""FP16: what stays FP32, that the rest is FP16, and that scores do not move by more than rounding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exported import ENCODERS, detector, fp32_graph, graphs, images, magnitudes, run_graph
from onnx import TensorProto

from export.errors import ExportError
from export.graph import initializers, model_bytes
from export.onnx_export import check_contract, torch_outputs
from export.precision import NORM_REASON, PIXEL_REASON, SCORE_REASON, fp16_from_fp32, fp32_layers, score_layers


def node_types(model):
    """Element type of each node's first output, by node name."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = (*inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {node.name: types[node.output[0]] for node in model.graph.node}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_fp16_graph_keeps_the_contract_and_the_scores(encoder):
    model = graphs(encoder)["fp16"]
    check_contract(model, input_size=(160, 160))
    theirs = torch_outputs(detector(encoder), images())
    ours = run_graph(model, images())
    # Measured: 4e-4 on unit rows of test_efficientnet, 2e-4 of test_resnet.
    np.testing.assert_allclose(ours["embeddings"], theirs[2], atol=2e-3)
    assert np.abs(ours["embeddings"] - theirs[2]).max() > 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_convolutions_are_float16_and_kept_layers_float32(encoder):
    keep = fp32_layers(fp32_graph(encoder), magnitudes(encoder))
    types = node_types(graphs(encoder)["fp16"])
    convolutions = [n.name for n in graphs(encoder)["fp16"].graph.node if n.op_type == "Conv"]
    assert convolutions
    assert {types[name] for name in convolutions} == {TensorProto.FLOAT16}
    assert {types[name] for name in keep} == {TensorProto.FLOAT}


def test_pixels_norms_and_scores_stay_float32_with_a_reason_each():
    keep = fp32_layers(fp32_graph("test_resnet"), magnitudes("test_resnet"))
    by_op = {node.name: node.op_type for node in fp32_graph("test_resnet").graph.node}
    reasons = {by_op[name]: why for name, why in keep.items()}
    assert reasons["ReduceL2"] == NORM_REASON
    assert reasons["Cast"] == PIXEL_REASON
    assert keep["projection.2"] == SCORE_REASON
    assert "classifier" in keep
    assert all(len(why) > 10 for why in keep.values())


def test_a_layer_that_would_overflow_stays_float32_and_is_named_with_its_range():
    largest = dict(magnitudes("test_resnet"))
    chosen = next(n for n in fp32_graph("test_resnet").graph.node if n.op_type == "Conv" and "layer2" in n.name)
    largest[chosen.output[0]] = 20_000.0
    keep = fp32_layers(fp32_graph("test_resnet"), largest)
    assert "reaches 2e+04" in keep[chosen.name]
    assert chosen.name not in fp32_layers(fp32_graph("test_resnet"), magnitudes("test_resnet"))
    types = node_types(fp16_from_fp32(fp32_graph("test_resnet"), keep))
    assert types[chosen.name] == TensorProto.FLOAT


def test_mean_pooling_counts_the_sum_in_front_of_the_division():
    largest = dict(magnitudes("test_resnet"))
    pool = next(n for n in fp32_graph("test_resnet").graph.node if n.op_type == "ReduceMean")
    largest[pool.input[0]] = 1000.0  # 25 cells: a sum of 25,000
    assert "reaches 2.5e+04" in fp32_layers(fp32_graph("test_resnet"), largest)[pool.name]


def test_half_of_the_weights_bytes_are_gone():
    fp32, fp16 = graphs("test_resnet")["fp32"], graphs("test_resnet")["fp16"]
    assert len(model_bytes(fp16)) < 0.6 * len(model_bytes(fp32))
    assert initializers(fp16)["projection.0.weight"].data_type == TensorProto.FLOAT16


def test_rewriting_twice_gives_the_same_bytes_and_leaves_the_input_alone():
    before = model_bytes(fp32_graph("test_resnet"))
    keep = fp32_layers(fp32_graph("test_resnet"), magnitudes("test_resnet"))
    once = model_bytes(fp16_from_fp32(fp32_graph("test_resnet"), keep))
    assert model_bytes(fp16_from_fp32(fp32_graph("test_resnet"), keep)) == once
    assert model_bytes(fp32_graph("test_resnet")) == before


def test_an_output_in_float16_is_refused():
    keep = {name: why for name, why in score_layers(fp32_graph("test_resnet")).items() if "Squeeze" not in name}
    with pytest.raises(ExportError, match="got a float16 tensor, wanted float32 at every precision"):
        fp16_from_fp32(fp32_graph("test_resnet"), keep)
