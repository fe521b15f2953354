"""INT8 graphs that another program quantised, for example NVIDIA's ModelOpt, from the FP32 graph of a bundle."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto

from export.errors import ExportError
from export.graphs import PrecisionGraph, checked_graph
from export.onnx_export import input_size
from export.precision import LAYER_OPS

REASON = "left in floating point by the program that quantised the graph"


def foreign_int8(path: Path, fp32: ModelProto) -> PrecisionGraph:
    """The graph of a Q/DQ file, if it keeps the contract; whether it decides as `fp32` does is for a `Judge` to say.

    Args:
        path: .onnx file with its weights inside.
        fp32: graph of the run that it should be the INT8 form of.

    Raises:
        ExportError: it cannot be read, has no layer in INT8, takes other pictures or breaks the contract.
    """
    model = _read(path)
    kinds = {node.op_type for node in model.graph.node}
    if not {"QuantizeLinear", "DequantizeLinear"} <= kinds:
        raise _refusal(path, "a graph without QuantizeLinear and DequantizeLinear nodes", "explicit INT8 quantisation")
    if input_size(model) != input_size(fp32):
        raise _refusal(path, f"a graph for pictures of {input_size(model)}", f"{input_size(fp32)}, as the run's")
    kept = _float_layers(model)
    if len(kept) == sum(node.op_type in LAYER_OPS for node in model.graph.node):
        raise _refusal(path, "Q/DQ nodes, but no layer that reads both its inputs through them", "layers in INT8")
    try:
        return checked_graph("int8", model, kept, builder=_builder(model))
    except ExportError as error:
        raise _refusal(path, error.got, error.wanted) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refusal(path, f"a graph that does not fit together ({error})", "a valid ONNX graph") from error


def _read(path: Path) -> ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise _refusal(path, "no such file", "an .onnx file") from None
    except Exception as error:  # what protobuf raises on damaged bytes has no base class of its own
        raise _refusal(path, f"bytes that are no ONNX graph ({error})", "an .onnx file") from error
    if not model.graph.node:
        raise _refusal(path, "an empty graph", "an .onnx file with Q/DQ nodes")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise _refusal(path, "weights in another file", "one .onnx file with its weights inside")
    return model


def _float_layers(model: ModelProto) -> dict[str, str]:
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name or node.output[0]: REASON
        for node in model.graph.node
        if node.op_type in LAYER_OPS and not dequantized.issuperset(node.input[:2])
    }


def _builder(model: ModelProto) -> str:
    return " ".join(part for part in (model.producer_name, model.producer_version) if part) or "unknown"


def _refusal(path: Path, got: str, wanted: str) -> ExportError:
    remedy = "quantise the bundle's model.fp32.onnx with explicit Q/DQ nodes and keep its inputs and outputs"
    return ExportError(f"--qdq-onnx {path}", got=got, wanted=wanted, remedy=remedy)
