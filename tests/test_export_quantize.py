"""INT8: where Q/DQ nodes stand, their parameters, and that every back-end computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from exported import ENCODERS, batches, detector, fp32_graph, graphs, images, quantizer, run_graph
from onnx import TensorProto, helper, numpy_helper

from export.graph import consumers, initializers, model_bytes, producers, with_outputs
from export.onnx_export import check_contract, torch_outputs
from export.precision import LAYER_OPS
from export.quantize import (
    SMALLEST_SCALE,
    STEM_REASON,
    WEIGHT_LEVELS,
    QuantizationPlan,
    float16_scale,
    float_layers,
    int8_from_fp32,
    layer_errors,
    plan_quantization,
    quantized_weight,
    sqnr_db,
)
from export.session import open_session
from runtime.backends.openvino import compile_for_cpu


def plan_of(encoder):
    return plan_quantization(fp32_graph(encoder), float_layers(fp32_graph(encoder)))


def embedding_error(model, encoder):
    return 1 - float(
        (run_graph(model, images())["embeddings"] * torch_outputs(detector(encoder), images())[2]).sum(1).mean()
    )


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_int8_graph_keeps_the_contract_and_stays_near_pytorch(encoder, precision):
    model = graphs(encoder)[precision]
    check_contract(model, input_size=(160, 160))
    # Measured: 1 - cosine of 2e-4 (test_resnet) and 9e-4 (test_efficientnet).
    assert 0 < embedding_error(model, encoder) < 5e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_planned_layer_reads_int8_and_no_output_of_a_layer_is_quantised_for_nothing(encoder):
    model, plan = graphs(encoder)["int8"], plan_of(encoder)
    makers, readers = producers(model), consumers(model)
    by_name = {node.name: node for node in model.graph.node}
    assert len(plan.layers) > 10
    for name in plan.layers:
        assert [makers[i].op_type for i in by_name[name].input[:2]] == ["DequantizeLinear"] * 2, name
    shortcuts = {name for name, _ in plan.shortcuts}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            for reader in readers[node.output[0]]:
                assert reader.name in plan.layers or reader.name in shortcuts, (node.name, reader.name)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_scales_are_symmetric_per_channel_for_weights_and_per_tensor_for_activations(encoder):
    model = graphs(encoder)["int8"]
    stored = initializers(model)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero, scale = (numpy_helper.to_array(stored[node.input[i]]) for i in (2, 1))
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        if node.input[0] in stored:
            values = numpy_helper.to_array(stored[node.input[0]])
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert scale.shape == (values.shape[axis],)
            assert values.dtype == np.int8
            assert np.abs(values.astype(int)).max() <= WEIGHT_LEVELS
        else:
            assert scale.shape == ()


def test_biases_stay_float32():
    model = graphs("test_resnet")["int8"]
    stored = initializers(model)
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) == 3]
    assert {stored[node.input[2]].data_type for node in layers} == {TensorProto.FLOAT}


def test_of_a_residual_add_only_the_shortcut_is_int8():
    model, plan = graphs("test_resnet")["int8"], plan_of("test_resnet")
    assert plan.shortcuts
    makers, by_name = producers(model), {node.name: node for node in model.graph.node}
    for name, _ in plan.shortcuts:
        kinds = sorted(makers[i].op_type for i in by_name[name].input)
        assert kinds == ["Conv", "DequantizeLinear"], name


def residual_graph(*, shortcut_first, channels=2):
    """x -> Relu -> Conv with weights of 1 -> Add with the Relu's output."""
    weight = numpy_helper.from_array(np.ones((channels, channels, 1, 1), np.float32), "w")
    order = ["r", "c"] if shortcut_first else ["c", "r"]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w"], ["c"], name="conv"),
        helper.make_node("Add", order, ["y"], name="add"),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", channels, 4, 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "residual", value[:1], value[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_the_shortcut_is_found_on_either_side(shortcut_first):
    plan = plan_quantization(residual_graph(shortcut_first=shortcut_first), {})
    assert plan.layers == ("conv",)
    assert plan.shortcuts == (("add", "r"),)


@pytest.mark.parametrize("order", [["c", "r"], ["r", "c"]])
def test_a_shortcut_that_nothing_else_reads_is_the_operand_without_a_layer(order):
    model = residual_graph(shortcut_first=True)
    model.graph.node[1].input[0] = "x"
    del model.graph.node[2].input[:]
    model.graph.node[2].input.extend(order)
    assert plan_quantization(model, {}).shortcuts == (("add", "r"),)


def test_stem_scores_and_pixels_are_left_in_float_with_reasons():
    kept = float_layers(fp32_graph("test_resnet"))
    stem = next(n.name for n in fp32_graph("test_resnet").graph.node if n.op_type in LAYER_OPS)
    assert kept[stem] == STEM_REASON
    assert {"classifier", "projection.2"} <= kept.keys()
    assert not kept.keys() & set(plan_of("test_resnet").layers)


def test_weight_rounds_to_the_nearest_step_of_its_channel():
    weight = np.array([[63.0, -31.5], [0.63, 0.004]], np.float32)
    scale, values = quantized_weight(weight, axis=0)
    assert values.tolist() == [[63, -32], [63, 0]]
    np.testing.assert_allclose(scale, [1.0, 0.01], rtol=1e-3)


def test_scales_are_float16_numbers_and_never_vanish():
    scale = float16_scale(np.array([1 / 3, 1e-9, 0.0]))
    assert scale.dtype == np.float32
    assert (scale.astype(np.float16) == scale).all()
    assert scale[1:].tolist() == [SMALLEST_SCALE, SMALLEST_SCALE]


def test_fp16_remainder_keeps_the_integers_and_scales_of_the_fp32_one():
    one, other = initializers(graphs("test_resnet")["int8"]), initializers(graphs("test_resnet")["int8+fp16"])
    integers = [name for name, tensor in one.items() if tensor.data_type == TensorProto.INT8]
    assert integers
    for name in integers:
        np.testing.assert_array_equal(numpy_helper.to_array(one[name]), numpy_helper.to_array(other[name]))
    scales = [name for name in one if name.endswith(".scale") and name in other and name != "normalizer.scale"]
    for name in scales:
        np.testing.assert_array_equal(numpy_helper.to_array(one[name]), numpy_helper.to_array(other[name]))


def test_corrected_biases_bring_the_graph_nearer_to_pytorch():
    made = quantizer("test_efficientnet")
    plain = int8_from_fp32(made.model, made.plan, made.ranges)
    corrected = made.graph(made.plan)
    assert embedding_error(corrected, "test_efficientnet") < 0.9 * embedding_error(plain, "test_efficientnet")


def test_the_error_of_a_layer_is_that_of_its_output_alone():
    made = quantizer("test_resnet")
    name = list(made.errors)[3]
    node = next(node for node in made.model.graph.node if node.name == name)
    alone = int8_from_fp32(made.model, made.plan.only([name]), made.ranges)
    wanted, found = (
        open_session(with_outputs(model, [node.output[0]])).run(None, {"images": images()})[0]
        for model in (made.model, alone)
    )
    error = made.errors[name]
    np.testing.assert_allclose(error.mean, (wanted - found).mean((0, 2, 3)), atol=1e-4)
    noise = np.square(wanted - found).mean((0, 2, 3)) - error.mean**2
    assert error.sqnr_db == pytest.approx(10 * np.log10(np.square(wanted).mean() / noise.mean()), abs=0.05)


def test_noise_a_hundredth_of_the_signal_is_20_decibels():
    assert sqnr_db(1.0, 0.01) == pytest.approx(20)
    assert sqnr_db(1.0, 0.0) == np.inf


def test_a_part_of_a_plan_leaves_the_other_nodes_as_they_were():
    made = quantizer("test_resnet")
    returned = made.plan.units[:2] + made.plan.units[-1:]
    part = made.plan.without(returned)
    assert set(part.units) | set(returned) == set(made.plan.units)
    assert made.plan.only(returned).units == returned
    graph = made.graph(part)
    before = {node.name: node for node in made.model.graph.node}
    after = {node.name: node for node in graph.graph.node}
    assert all(list(after[name].input) == list(before[name].input) for name in returned)
    assert list(after[part.layers[0]].input) != list(before[part.layers[0]].input)
    assert made.graph(QuantizationPlan((), ())).SerializeToString() == made.model.SerializeToString()


def test_quantising_twice_gives_the_same_bytes_and_a_quarter_of_the_size():
    made = quantizer("test_resnet")
    errors = layer_errors(made.model, made.plan, made.ranges, batches)
    again = replace(made, errors=errors).graph(made.plan)
    assert model_bytes(again) == model_bytes(graphs("test_resnet")["int8"])
    assert len(model_bytes(again)) < 0.4 * len(model_bytes(made.model))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_integer_kernels_do_not_saturate(backend):
    """A CPU without VNNI adds two 8-bit products in 16 bits: two of 127 * 127 and an offset would overflow there."""
    pytest.importorskip(backend)
    model = residual_graph(shortcut_first=True, channels=32)
    plan = plan_quantization(model, {})
    quantized = int8_from_fp32(model, plan, {"r": 6.0})
    pixels = np.full((1, 32, 4, 4), 6.0, np.float32)
    (found,) = run_any(backend, quantized, {"x": pixels})
    # 32 products of 6 and 1, and the shortcut.
    np.testing.assert_allclose(found, 32 * 6.0 + 6.0, rtol=2e-3)


def run_any(backend, model, feeds):
    if backend == "onnxruntime":
        return open_session(model).run(None, feeds)
    pytest.importorskip("openvino")
    compiled = compile_for_cpu(model_bytes(model))
    return [np.array(values) for values in compiled(feeds).values()]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8+fp16"])
def test_a_score_does_not_depend_on_its_batch(encoder, precision):
    model = graphs(encoder)[precision]
    together = run_graph(model, images())["logits"]
    alone = np.concatenate([run_graph(model, images()[i : i + 1])["logits"] for i in range(4)])
    turned = run_graph(model, images()[::-1].copy())["logits"][::-1]
    # The logits' standard deviation is 2. Measured: alone 0 (FP32) to 1e-4 (INT8), turned 0.
    np.testing.assert_allclose(alone, together[:4], atol=1e-3)
    np.testing.assert_allclose(turned, together, atol=1e-3)


def test_graph_of_int8_is_valid_for_the_checker():
    onnx.checker.check_model(graphs("test_efficientnet")["int8"], full_check=True)
    assert {n.op_type for n in graphs("test_efficientnet")["int8"].graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
