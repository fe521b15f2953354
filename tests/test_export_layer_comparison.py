"""Tensors of two graphs are matched and measured, and the damaged layer is the one that is named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bundle_fixtures import random_images, tiny_graph
from onnx import ModelProto, helper, numpy_helper

from export import layer_comparison
from export.errors import ExportError
from export.graph import copy_of, initializers, redirect, sort_nodes, store
from export.layer_comparison import EQUAL_DB, WORST_DB, compare_layers, float_activations, match_tensors
from export.precision import fp16_from_fp32, score_layers
from export.quantize import int8_from_fp32, plan_quantization, quantized_tensors

ACTIVATIONS = ("float", "unit", "centred", "nchw", "conv", "features", "pooled", "logit_column", "raw", "logits")


@pytest.fixture(scope="module")
def fp32():
    """The tiny graph with nodes named after what they make, as an export names them after their weights."""
    model = ModelProto.FromString(tiny_graph())
    for node in model.graph.node:
        node.name = f"make {node.output[0]}"
    return model


@pytest.fixture(scope="module")
def int8(fp32):
    plan = plan_quantization(fp32, {"make centred": "pixels", "make logits": "score", "make evidence": "score"})
    return int8_from_fp32(fp32, plan, dict.fromkeys(quantized_tensors(fp32, plan), 2.0))


def batches():
    return iter(np.split(random_images(8), 2))


def compare(reference, graph, *, bound_db=10.0):
    return compare_layers(reference, graph, batches, precision="int8", bound_db=bound_db)


def scaled(model, name, factor):
    """A copy with a stored tensor multiplied."""
    changed = copy_of(model)
    values = numpy_helper.to_array(initializers(changed)[name])
    store(changed, name, (values * factor).astype(values.dtype))
    return changed


def by_tensor(comparison):
    return {layer.compared: layer for layer in comparison.layers}


def test_equal_graphs_are_equal_at_every_tensor(fp32):
    result = compare(fp32, fp32)
    assert [layer.tensor for layer in result.layers][: len(ACTIVATIONS)] == list(ACTIVATIONS)
    assert {layer.sqnr_db for layer in result.layers} == {EQUAL_DB}
    assert (result.pictures, result.culprit, result.broken()) == (8, None, [])
    assert (result.reference_only, result.graph_only) == ((), ())


def test_figures_are_those_of_a_weight_that_is_a_tenth_too_large(fp32):
    layers = by_tensor(compare(fp32, scaled(fp32, "patch", 1.1)))
    assert layers["nchw"].sqnr_db == EQUAL_DB
    for name in ("conv", "features", "logits"):
        assert layers[name].sqnr_db == pytest.approx(20.0, abs=1e-3)
        assert layers[name].max_relative_error == pytest.approx(0.1, rel=1e-4)
        assert layers[name].mean_relative_error == pytest.approx(0.1, rel=1e-4)
    assert layers["conv"].own_sqnr_db == pytest.approx(20.0, abs=1e-3)
    assert layers["features"].own_sqnr_db > 50  # the activation adds nothing to what it reads


@pytest.mark.parametrize(("weight", "tensor"), [("patch.scale", "conv"), ("head.scale", "logit_column")])
def test_the_layer_whose_weights_are_damaged_is_named(fp32, int8, weight, tensor):
    assert compare(fp32, int8).culprit is None
    result = compare(fp32, scaled(int8, weight, 3.0))
    assert (result.culprit.tensor, result.culprit.node) == (tensor, f"make {tensor}")
    (broken,) = result.broken()
    assert f"tensor {tensor} of node make {tensor} (" in broken
    assert "SQNR -6." in broken  # 20 log10(1 / 2)


def test_the_bound_decides_which_tensor_is_the_first(fp32):
    damaged = scaled(scaled(fp32, "patch", 1.1), "embed", np.linspace(0.2, 2.0, 128))
    assert compare(fp32, damaged, bound_db=25.0).culprit.tensor == "conv"
    assert compare(fp32, damaged, bound_db=10.0).culprit.tensor == "wide"
    assert compare(fp32, damaged, bound_db=0.0).culprit is None


def test_quantised_copies_are_compared_with_the_tensor_that_they_are_of(fp32, int8):
    result = compare(fp32, int8)
    pairs = [(layer.tensor, layer.compared, layer.op_type) for layer in result.layers]
    assert ("nchw", "nchw.dq", "DequantizeLinear") in pairs
    assert ("pooled", "pooled.dq", "DequantizeLinear") in pairs
    assert {layer.tensor for layer in result.layers} == set(float_activations(fp32))
    assert (result.reference_only, result.graph_only) == ((), ())
    assert by_tensor(result)["nchw"].sqnr_db == EQUAL_DB
    assert 20 < by_tensor(result)["nchw.dq"].sqnr_db < 60


def test_an_activation_range_that_clips_is_named_as_its_quantiser(fp32, int8):
    culprit = compare(fp32, scaled(int8, "pooled.scale", 0.02)).culprit
    assert (culprit.tensor, culprit.compared, culprit.node) == ("pooled", "pooled.dq", "pooled.dequantize")


def test_names_that_another_quantiser_gave_are_found_through_its_nodes(fp32):
    """Onnxruntime lets the last DequantizeLinear take the name, and renames what the layer makes."""
    renamed = copy_of(fp32)
    (conv,) = (node for node in renamed.graph.node if node.output[0] == "conv")
    conv.output[0] = "conv_QuantizeLinear_Input"
    scale, zero = store(renamed, "s", np.float32(0.02)), store(renamed, "z", np.int8(0))
    make = helper.make_node
    renamed.graph.node.append(make("QuantizeLinear", [conv.output[0], scale, zero], ["conv_q"], name="q"))
    renamed.graph.node.append(make("DequantizeLinear", ["conv_q", scale, zero], ["conv"], name="dq"))
    sort_nodes(renamed)
    layers = by_tensor(compare(fp32, renamed))
    assert layers["conv_QuantizeLinear_Input"].tensor == layers["conv"].tensor == "conv"
    assert layers["conv_QuantizeLinear_Input"].sqnr_db == EQUAL_DB
    assert 20 < layers["conv"].sqnr_db < 60


def test_tensors_without_a_counterpart_are_listed(fp32):
    other = copy_of(fp32)
    (relu,) = (node for node in other.graph.node if node.op_type == "Relu")
    relu.output[0] = "activated"
    redirect(other.graph.node, "features", "activated")
    result = compare(fp32, other)
    assert (result.reference_only, result.graph_only) == (("features",), ("activated",))
    assert "features" not in by_tensor(result)


def test_half_precision_is_compared_as_it_is(fp32):
    half = fp16_from_fp32(fp32, score_layers(fp32) | dict.fromkeys(["make float", "make unit"], "pixels"))
    types = {activation.elem_type for activation in float_activations(half).values()}
    assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    layers = by_tensor(compare(fp32, half))
    assert 50 < layers["features"].sqnr_db < 90


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_as_far_off_as_can_be(fp32, value):
    culprit = compare(fp32, scaled(fp32, "patch", value)).culprit
    assert (culprit.tensor, culprit.sqnr_db, culprit.max_relative_error) == ("conv", WORST_DB, np.inf)


def test_little_memory_means_more_runs_and_the_same_figures(fp32, int8, monkeypatch):
    expected = compare(fp32, int8)
    opened, open_graph = [], layer_comparison._opened

    def counted(model, tensors):
        opened.append(tensors)
        return open_graph(model, tensors)

    monkeypatch.setattr(layer_comparison, "_opened", counted)
    monkeypatch.setattr(layer_comparison, "MEMORY_BYTES", 40_000)
    assert compare(fp32, int8) == expected
    assert len(opened) > 6
    assert max(map(len, opened)) < len(expected.layers) / 2


def test_graphs_without_a_common_tensor_are_refused(fp32):
    other = copy_of(fp32)
    for node in other.graph.node:
        node.input[:] = [f"{name}!" if name in float_activations(fp32) else name for name in node.input]
        node.output[:] = [f"{name}!" for name in node.output]
    for output in other.graph.output:
        output.name += "!"
    assert match_tensors(fp32, other).pairs == ()
    with pytest.raises(ExportError, match="no tensor that the FP32 graph has as well"):
        compare(fp32, other)
