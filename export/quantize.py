"""INT8: explicit Q/DQ nodes where TensorRT, onnxruntime and OpenVINO all compute in integers.

The placement is what all three accept: symmetric and static, one scale per output channel for weights and one
per tensor for activations, on the inputs of layers only, float biases; of a residual Add only the shortcut.
Weights are stored as integers behind a DequantizeLinear, so the file is about a quarter of the FP32 one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from export.calibration import Batches
from export.graph import (
    attribute,
    consumers,
    copy_of,
    initializers,
    insert_nodes,
    producers,
    redirect,
    remove_unused,
    store,
    with_outputs,
)
from export.precision import LAYER_OPS, pixel_layers, score_layers
from export.session import open_session
from runtime.manifest import INPUT_NAME

ACTIVATION_LEVELS = 127  # of -127..127; -128 is left out so that the scale is symmetric
# CPUs without VNNI add two 8-bit products in 16 bits: full-range weights saturate there, in onnxruntime and in
# OpenVINO, without a word. On EfficientNet-lite0 that took the embeddings' mean cosine from 0.987 to 0.77.
WEIGHT_LEVELS = 63
STEM_REASON = "first layer: three input channels gain nothing from INT8, and it reads the finest traces"
# Scales are float16 in the shipped graph: below this one they lose more than a part in a thousand.
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class QuantizationPlan:
    """Where Q/DQ nodes go.

    Attributes:
        layers: names of Conv, Gemm and MatMul nodes that compute in INT8.
        shortcuts: (name of an Add, tensor it reads in INT8) for residual additions.
    """

    layers: tuple[str, ...]
    shortcuts: tuple[tuple[str, str], ...]

    @property
    def units(self) -> tuple[str, ...]:
        """Names of all nodes that the plan touches, in graph order of their kinds."""
        return self.layers + tuple(name for name, _ in self.shortcuts)

    def only(self, names: Collection[str]) -> QuantizationPlan:
        """The part of the plan that these nodes are."""
        return QuantizationPlan(
            tuple(name for name in self.layers if name in names),
            tuple((name, tensor) for name, tensor in self.shortcuts if name in names),
        )

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """The plan with these nodes left in floating point."""
        return self.only([name for name in self.units if name not in set(names)])


def float_layers(model: ModelProto) -> dict[str, str]:
    """Nodes that an INT8 graph computes in floating point, each with the reason."""
    first = next((n.name for n in model.graph.node if n.op_type in LAYER_OPS), None)
    return pixel_layers(model) | ({first: STEM_REASON} if first else {}) | score_layers(model)


def plan_quantization(model: ModelProto, keep: Mapping[str, str]) -> QuantizationPlan:
    """All layers with stored weights and the additions of residual convolutions, except the nodes of `keep`.

    A transformer's residual stream stays in floating point: a few of its channels are far larger than the rest.
    """
    stored, readers, makers = initializers(model), consumers(model), producers(model)
    layers, shortcuts = [], []
    for node in model.graph.node:
        if node.name in keep:
            continue
        if node.op_type in LAYER_OPS and node.input[1] in stored and len(stored[node.input[1]].dims) > 1:
            layers.append(node.name)
        elif node.op_type == "Add" and any(makers[i].op_type == "Conv" for i in node.input if i in makers):
            shortcuts.append((node.name, _shortcut(node, readers, makers)))
    return QuantizationPlan(tuple(layers), tuple(shortcuts))


def quantized_tensors(model: ModelProto, plan: QuantizationPlan) -> list[str]:
    """Activations that the plan turns into INT8, in graph order."""
    chosen = {node.input[0] for node in model.graph.node if node.name in set(plan.layers)}
    chosen |= {tensor for _, tensor in plan.shortcuts}
    return [name for node in model.graph.node for name in node.output if name in chosen]


def int8_from_fp32(
    model: ModelProto,
    plan: QuantizationPlan,
    ranges: Mapping[str, float],
    corrections: Mapping[str, NDArray[np.float64]] | None = None,
) -> ModelProto:
    """Graph with Q/DQ nodes; every scale is a float16 number, so an FP16 rewrite keeps them exact.

    Args:
        model: FP32 graph; batch norms must be folded already.
        plan: from `plan_quantization`.
        ranges: magnitude at which each tensor of `quantized_tensors` is clipped.
        corrections: from `bias_corrections`; those of layers outside the plan are not used.
    """
    quantized = copy_of(model)
    by_name = {node.name: node for node in quantized.graph.node}
    made: dict[str, NodeProto] = {}
    for name in plan.layers:
        node = by_name[name]
        _read_quantized(quantized, node, str(node.input[0]), ranges, made)
        _quantize_weight(quantized, node, made)
        if corrections and name in corrections:
            _correct_bias(quantized, node, corrections[name])
    for name, tensor in plan.shortcuts:
        _read_quantized(quantized, by_name[name], tensor, ranges, made)
    insert_nodes(quantized, made.values())
    remove_unused(quantized)
    return quantized


@dataclass(frozen=True)
class LayerError:
    """What quantising one convolution alone does to its own output, its inputs being those of FP32.

    Attributes:
        mean: (channels,) mean error of the output, FP32 minus INT8.
        sqnr_db: signal to quantisation noise of the output in decibels, after the mean error is taken out.
    """

    mean: NDArray[np.float64]
    sqnr_db: float


def layer_errors(
    model: ModelProto, plan: QuantizationPlan, ranges: Mapping[str, float], batches: Batches
) -> dict[str, LayerError]:
    """Error of each quantised convolution by itself, all measured in one pass.

    Args:
        model: FP32 graph.
        plan: where Q/DQ nodes go.
        ranges: magnitude at which each tensor is clipped.
        batches: calibration pictures.
    """
    layers = [n for n in model.graph.node if n.name in set(plan.layers) and n.op_type == "Conv" and len(n.input) == 3]
    if not layers:
        return {}
    session = open_session(_error_probe(model, int8_from_fp32(model, plan, ranges), layers))
    sums: list[NDArray[np.float64]] = []
    pictures = 0
    for images in batches():
        found = [len(images) * np.asarray(value, np.float64) for value in session.run(None, {INPUT_NAME: images})]
        sums = [total + value for total, value in zip(sums, found, strict=True)] if sums else found
        pictures += len(images)
    means = [total / pictures for total in sums]
    return {
        layer.name: LayerError(mean, sqnr_db(float(signal), float(np.mean(square - mean**2))))
        for layer, mean, square, signal in zip(layers, means[::3], means[1::3], means[2::3], strict=True)
    }


def bias_corrections(errors: Mapping[str, LayerError]) -> dict[str, NDArray[np.float64]]:
    """What is added to each convolution's bias so that quantising does not shift its channels.

    The local, measured form of bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2).
    """
    return {name: error.mean for name, error in errors.items()}


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantisation noise in decibels of two mean squares; infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(max(signal, float(np.finfo(float).tiny)) / noise)


def _error_probe(model: ModelProto, quantized: ModelProto, layers: list[NodeProto]) -> ModelProto:
    """FP32 graph with three outputs a layer.

    Mean and mean square, per channel, of its output minus that of its quantised twin; mean square of its output.
    """
    probe = copy_of(model)
    present = initializers(model)
    probe.graph.initializer.extend(t for t in quantized.graph.initializer if t.name not in present)
    axes = store(probe, "probe.axes", np.array([0, 2, 3]))
    nodes = [n for n in quantized.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    by_name = {node.name: node for node in quantized.graph.node}
    outputs = []
    for layer in layers:
        twin, difference, error, square, power, signal = (
            f"{layer.name}.{part}" for part in ("twin", "difference", "error", "square", "power", "signal")
        )
        copied = NodeProto.FromString(by_name[layer.name].SerializeToString())
        copied.name = copied.output[0] = twin
        make = onnx.helper.make_node
        nodes += [
            copied,
            make("Sub", [layer.output[0], twin], [difference]),
            make("ReduceMean", [difference, axes], [error], keepdims=0),
            make("Mul", [difference, difference], [f"{square}.map"]),
            make("ReduceMean", [f"{square}.map", axes], [square], keepdims=0),
            make("Mul", [layer.output[0], layer.output[0]], [power]),
            make("ReduceMean", [power], [signal], keepdims=0),
        ]
        outputs += [error, square, signal]
    insert_nodes(probe, nodes)
    return with_outputs(probe, outputs)


def _correct_bias(model: ModelProto, node: NodeProto, correction: NDArray[np.float64]) -> None:
    bias = numpy_helper.to_array(initializers(model)[node.input[2]])
    store(model, node.input[2], (bias + correction).astype(np.float32))


def _shortcut(node: NodeProto, readers: Mapping[str, list[NodeProto]], makers: Mapping[str, NodeProto]) -> str:
    """The operand that comes around the block: it is read elsewhere too, or no convolution ends in it."""
    first, second = (str(name) for name in node.input)
    for one, other in ((first, second), (second, first)):
        if len(readers[one]) > 1 and len(readers[other]) == 1:
            return one
    for one, other in ((first, second), (second, first)):
        if makers[one].op_type not in LAYER_OPS and makers[other].op_type in LAYER_OPS:
            return one
    return second


def _read_quantized(
    model: ModelProto, node: NodeProto, tensor: str, ranges: Mapping[str, float], made: dict[str, NodeProto]
) -> None:
    """Let `node` read `tensor` through one Q/DQ pair, which all its INT8 readers share."""
    if f"{tensor}.quantize" not in made:
        scale = float16_scale(np.array(ranges[tensor] / ACTIVATION_LEVELS))
        parameters = [
            store(model, f"{tensor}.scale", scale),
            store(model, f"{tensor}.zero", np.array(0, dtype=np.int8)),
        ]
        _add(made, "QuantizeLinear", f"{tensor}.quantize", [tensor, *parameters], f"{tensor}.int8")
        _add(made, "DequantizeLinear", f"{tensor}.dequantize", [f"{tensor}.int8", *parameters], f"{tensor}.dq")
    redirect([node], tensor, f"{tensor}.dq")


def _quantize_weight(model: ModelProto, node: NodeProto, made: dict[str, NodeProto]) -> None:
    """Store the weight of `node` as integers with one scale per output channel, and read it through DQ."""
    name = node.input[1]
    if f"{name}.dequantize" not in made:
        weight = numpy_helper.to_array(initializers(model)[name])
        axis = _output_axis(node, weight.ndim)
        scale, values = quantized_weight(weight, axis=axis)
        inputs = [
            store(model, f"{name}.int8", values),
            store(model, f"{name}.scale", scale),
            store(model, f"{name}.zero", np.zeros(len(scale), dtype=np.int8)),
        ]
        _add(made, "DequantizeLinear", f"{name}.dequantize", inputs, f"{name}.dq", axis=axis)
    node.input[1] = f"{name}.dq"


def quantized_weight(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scales (channels,) and integers of a weight, each channel of `axis` filling its range."""
    others: tuple[int, ...] = tuple(i for i in range(weight.ndim) if i != axis)
    scale = float16_scale(np.asarray(np.abs(weight).max(axis=others) / WEIGHT_LEVELS))
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.round(weight / scale.reshape(shape)), -WEIGHT_LEVELS, WEIGHT_LEVELS)
    return scale, np.asarray(values, dtype=np.int8)


def float16_scale(scale: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales rounded to float16 numbers and kept above SMALLEST_SCALE, as float32."""
    return np.asarray(np.maximum(scale, SMALLEST_SCALE).astype(np.float16), dtype=np.float32)


def _output_axis(node: NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def _add(made: dict[str, NodeProto], kind: str, name: str, inputs: list[str], output: str, **attributes: int) -> None:
    made[name] = onnx.helper.make_node(kind, inputs, [output], name=name, **attributes)
