"""FP16: which nodes stay in FP32 and why, and the rewrite of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from export.errors import ExportError
from export.graph import (
    consumers,
    copy_of,
    float_tensors,
    initializers,
    insert_nodes,
    producers,
    redirect,
    remove_unused,
    store,
)

FP16_LARGEST = 65504.0
# Pictures in use may drive a tensor further than the calibration pictures did.
FP16_HEADROOM = 4.0
LAYER_OPS = ("Conv", "Gemm", "MatMul")
PIXEL_REASON = "pixels are normalised in float32, where every grey level is exact"
NORM_REASON = "L2 norm: its squares overflow above 256 and its epsilon of 1e-12 is zero in half precision"
AFTER_NORM_REASON = "after the L2 norm: the scores and the evidence are computed in float32"
SCORE_REASON = "last layer in front of an output: half precision would round the score"


def fp32_layers(model: ModelProto, largest: Mapping[str, float]) -> dict[str, str]:
    """Nodes of an FP32 graph that must stay FP32, each with the reason.

    Args:
        model: FP32 graph of the contract.
        largest: largest magnitude of each activation on the calibration pictures.
    """
    kept = pixel_layers(model) | score_layers(model)
    sizes = float_tensors(model)
    for node in model.graph.node:
        reached = _reached(node, largest, sizes)
        if node.name not in kept and reached * FP16_HEADROOM > FP16_LARGEST:
            kept[node.name] = f"reaches {reached:.3g} on calibration pictures; half precision ends at 65504"
    return kept


def pixel_layers(model: ModelProto) -> dict[str, str]:
    """Everything between the input and the first layer, with the reason."""
    kept: dict[str, str] = {}
    touched = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if touched.intersection(node.input) and node.op_type not in LAYER_OPS:
            kept[node.name] = PIXEL_REASON
            if node.op_type != "Shape":  # the size of the batch is no pixel
                touched.update(node.output)
    return kept


def score_layers(model: ModelProto) -> dict[str, str]:
    """The L2 norms, everything after them, and the last layer in front of each output, with the reasons."""
    kept: dict[str, str] = {}
    touched: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "ReduceL2":
            kept[node.name] = NORM_REASON
        elif touched.intersection(node.input):
            kept[node.name] = AFTER_NORM_REASON
        else:
            continue
        touched.update(node.output)
    makers = producers(model)
    for output in model.graph.output:
        for node in _back_to_layer(output.name, makers):
            kept.setdefault(node.name, SCORE_REASON)
    return kept


def fp16_from_fp32(model: ModelProto, keep: Mapping[str, str]) -> ModelProto:
    """Graph whose activations and weights are float16, except in the nodes of `keep`; outputs stay float32.

    Args:
        model: FP32 graph, with or without Q/DQ nodes (float16 scales need opset 19).
        keep: names of the nodes that stay float32; must hold those that make the outputs.

    Raises:
        ExportError: a node that makes an output is not in `keep`.
    """
    half = copy_of(model)
    makers = producers(half)
    turned = {node.name for node in half.graph.node if node.name not in keep}
    # A tensor has the type of its maker; a node that needs the other type reads it through a Cast.
    is_half = {name: makers[name].name in turned for name in float_tensors(half)}
    _require_float_outputs(half, is_half)
    casts: dict[str, NodeProto] = {}
    for node in half.graph.node:
        for name in dict.fromkeys(node.input):
            if is_half.get(name, node.name in turned) != (node.name in turned):
                redirect([node], name, _cast(casts, name, to_half=node.name in turned))
    _halve_weights(half, turned)
    _halve_casts(half, turned)
    insert_nodes(half, casts.values())
    remove_unused(half)
    return half


def _reached(node: NodeProto, largest: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    reached = max((largest.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
    if node.op_type == "ReduceMean":  # The sum comes before the division.
        reached *= max(1.0, sizes.get(node.input[0], 1) / max(1, sizes.get(node.output[0], 1)))
    return reached


def _back_to_layer(name: str, makers: Mapping[str, NodeProto]) -> Iterator[NodeProto]:
    """The node that makes a tensor and those before it, up to and including the first with weights."""
    node = makers.get(name)
    if node is None:
        return
    yield node
    if node.op_type not in LAYER_OPS:
        for before in node.input:
            yield from _back_to_layer(before, makers)


def _cast(casts: dict[str, NodeProto], name: str, *, to_half: bool) -> str:
    suffix, kind = ("fp16", TensorProto.FLOAT16) if to_half else ("fp32", TensorProto.FLOAT)
    made = f"{name}.{suffix}"
    casts[made] = onnx.helper.make_node("Cast", [name], [made], name=f"Cast_{made}", to=kind)
    return made


def _halve_weights(model: ModelProto, turned: set[str]) -> None:
    readers = consumers(model)
    for name, tensor in initializers(model).items():
        halved = [node for node in readers.get(name, []) if node.name in turned]
        if tensor.data_type != TensorProto.FLOAT or not halved:
            continue
        values = np.clip(numpy_helper.to_array(tensor), -FP16_LARGEST, FP16_LARGEST).astype(np.float16)
        shared = len(halved) < len(readers[name])
        redirect(halved, name, store(model, f"{name}.fp16" if shared else name, values))


def _halve_casts(model: ModelProto, turned: set[str]) -> None:
    for node in model.graph.node:
        for entry in node.attribute:
            if node.op_type == "Cast" and node.name in turned and entry.i == TensorProto.FLOAT:
                entry.i = TensorProto.FLOAT16


def _require_float_outputs(model: ModelProto, is_half: Mapping[str, bool]) -> None:
    for output in model.graph.output:
        if is_half[output.name]:
            raise ExportError(
                f"output {output.name}",
                got="a float16 tensor",
                wanted="float32 at every precision",
                remedy="keep the node that makes it in float32",
            )
