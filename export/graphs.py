"""The three ONNX graphs of a detector: FP32 from PyTorch, FP16 and INT8 rewritten from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx
from onnx import ModelProto
from rich.progress import track

from export.calibration import (
    BATCH_SIZE,
    Batches,
    PreparedPictures,
    clipped_range,
    largest_magnitudes,
    magnitude_histograms,
)
from export.graph import copy_of, float_tensors, model_bytes
from export.onnx_export import OPSET, check_contract, onnx_from_model
from export.precision import fp16_from_fp32, fp32_layers
from export.quantize import (
    QuantizationPlan,
    float_layers,
    int8_from_fp32,
    plan_quantization,
    quantized_tensors,
    with_corrected_biases,
)
from runtime.manifest import Precision
from train.model import NTFDetector

Say = Callable[[str], None]


@dataclass(frozen=True)
class PrecisionGraph:
    """One ONNX graph.

    Attributes:
        precision: "fp32", "fp16" or "int8".
        content: the bytes of the .onnx file.
        opset: of the graph.
        higher_precision_layers: nodes that compute in more than `precision`, each with the reason.
        evidence_shape: rows and columns of the evidence.
    """

    precision: Precision
    content: bytes
    opset: int
    higher_precision_layers: dict[str, str]
    evidence_shape: tuple[int, int]


def make_graphs(
    detector: NTFDetector,
    precisions: Iterable[Precision],
    pictures: PreparedPictures,
    *,
    int8_remainder: Precision = "fp32",
    say: Say = lambda message: None,
    progress: bool = False,
) -> dict[Precision, PrecisionGraph]:
    """The FP32 graph and those of the asked precisions, each checked against the contract.

    Args:
        detector: in evaluation mode.
        precisions: which graphs to make; FP32 is made in any case.
        pictures: what ranges are measured on.
        int8_remainder: "fp32" or "fp16": what an INT8 graph computes in between its integer layers.
        say: told what is being done.
        progress: show a bar for each pass over the pictures.

    Raises:
        ExportError: a graph breaks the contract or differs from PyTorch.
    """
    asked = set(precisions)
    batches = _shown(pictures, progress=progress)
    say("exporting the PyTorch model to ONNX")
    model = onnx_from_model(detector)
    models: dict[Precision, tuple[ModelProto, dict[str, str]]] = {"fp32": (model, {})}
    if asked - {"fp32"}:
        say(f"measuring ranges on {len(pictures)} calibration pictures")
        largest = largest_magnitudes(model, float_tensors(model), batches)
    if "fp16" in asked:
        say("rewriting to FP16")
        keep = fp32_layers(model, largest)
        models["fp16"] = (fp16_from_fp32(model, keep), keep)
    if "int8" in asked:
        say("quantising to INT8")
        kept = float_layers(model)
        quantized = quantize(model, plan_quantization(model, kept), largest, batches)
        if int8_remainder == "fp16":
            quantized = fp16_from_fp32(quantized, fp32_layers(model, largest))
        models["int8"] = (quantized, kept)
    return {name: _checked(name, graph, kept, detector) for name, (graph, kept) in models.items()}


def quantize(model: ModelProto, plan: QuantizationPlan, largest: dict[str, float], batches: Batches) -> ModelProto:
    """INT8 graph of an FP32 one: ranges that lose least in squared error, and corrected biases.

    Args:
        model: FP32 graph.
        plan: where Q/DQ nodes go.
        largest: largest magnitude of each activation.
        batches: the pictures that ranges and biases are measured on.
    """
    chosen = {name: largest[name] for name in quantized_tensors(model, plan)}
    counts = magnitude_histograms(model, chosen, batches)
    ranges = {name: clipped_range(counts[name], chosen[name]) for name in chosen}
    quantized = int8_from_fp32(model, plan, ranges)
    return with_corrected_biases(model, quantized, plan, batches)


def _shown(pictures: PreparedPictures, *, progress: bool) -> Batches:
    total = -(-len(pictures) // BATCH_SIZE)
    return lambda: track(pictures.batches(), "calibration pictures", total=total, disable=not progress)


def _checked(precision: Precision, model: ModelProto, kept: dict[str, str], detector: NTFDetector) -> PrecisionGraph:
    model = copy_of(model)
    check_contract(model, input_size=detector.input_size)
    shape = onnx.shape_inference.infer_shapes(model).graph.output[3].type.tensor_type.shape.dim
    rows, columns = (int(d.dim_value) for d in shape[1:])
    return PrecisionGraph(precision, model_bytes(model), OPSET, kept, (rows, columns))
