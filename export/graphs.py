"""The ONNX graphs of a detector: FP32 from PyTorch, FP16 and INT8 rewritten from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto

from export.calibration import PreparedPictures
from export.graph import copy_of, float_tensors, model_bytes
from export.int8 import Int8Search, Say, int8_within_budget
from export.int8_kept import KeptInt8
from export.judge import Candidate, Judge
from export.onnx_export import check_contract, input_size
from export.precision import fp16_from_fp32, fp32_layers
from export.quantize import float_layers
from export.ranges import largest_magnitudes
from runtime.manifest import Precision, Remainder


@dataclass(frozen=True, kw_only=True)
class PrecisionGraph(Candidate):
    """One ONNX graph that is shipped.

    Attributes:
        opset: of the graph.
        higher_precision_layers: nodes that compute in more than `precision`, each with the reason.
        evidence_shape: rows and columns of the evidence.
        builder: program and version that made it; "" for this toolkit's own.
    """

    opset: int
    higher_precision_layers: dict[str, str]
    evidence_shape: tuple[int, int]
    builder: str = ""


def reduced_graphs(
    fp32: ModelProto,
    precisions: Iterable[Precision],
    pictures: PreparedPictures,
    judge: Judge,
    *,
    calibrator: str = "auto",
    smallest_share: float = 0.5,
    kept: KeptInt8 | None = None,
    say: Say = lambda message: None,
) -> tuple[list[PrecisionGraph], Int8Search | None]:
    """Graphs of the asked precisions below FP32, each checked against the contract, and how INT8 was found.

    INT8 comes twice, with the same integers: a CPU computes fastest with FP32 in between, a GPU with FP16.

    Args:
        fp32: graph of the detector.
        precisions: which graphs to make.
        pictures: what ranges are measured on.
        judge: says what an INT8 graph costs.
        calibrator: of INT8 ranges, see `int8_within_budget`.
        smallest_share: of the operations that must stay in INT8, see there.
        kept: where INT8 is taken from when it was found before, and kept when it is found now; None for neither.
        say: told what is being done.

    Raises:
        ExportError: a graph breaks the contract, or no INT8 graph keeps within the budget.
    """
    asked = set(precisions)
    if not asked & {"fp16", "int8"}:
        return [], None
    say(f"measuring ranges on {len(pictures)} calibration pictures")
    largest = largest_magnitudes(fp32, float_tensors(fp32), pictures.batches)
    wide = fp32_layers(fp32, largest)
    graphs, search = [], None
    if "fp16" in asked:
        say("rewriting to FP16")
        graphs.append(checked_graph("fp16", fp16_from_fp32(fp32, wide), wide))
    if "int8" in asked:
        found = None if kept is None else kept.load(say)
        if found is None:
            say("quantising to INT8")
            found = int8_within_budget(
                fp32,
                largest,
                pictures,
                judge,
                for_engines=lambda model: fp16_from_fp32(model, wide),
                calibrator=calibrator,
                smallest_share=smallest_share,
                say=say,
            )
            if kept is not None:
                kept.save(*found, say)
        model, search = found
        graphs += int8_graphs(model, float_layers(fp32) | search.returned, wide)
    return graphs, search


def int8_graphs(model: ModelProto, kept: Mapping[str, str], wide: Mapping[str, str]) -> list[PrecisionGraph]:
    """An INT8 graph and its twin with FP16 between the integer layers.

    Args:
        model: with Q/DQ nodes and FP32 in between.
        kept: nodes that do not compute in integers, with the reasons.
        wide: nodes that stay FP32 in the twin as well.
    """
    half = checked_graph("int8", fp16_from_fp32(model, wide), {**wide, **kept}, remainder="fp16")
    return [checked_graph("int8", model, kept), half]


def checked_graph(
    precision: Precision,
    model: ModelProto,
    kept: Mapping[str, str],
    *,
    remainder: Remainder = "fp32",
    builder: str = "",
) -> PrecisionGraph:
    """A graph that keeps the contract, as it is shipped.

    Raises:
        ExportError: it breaks the contract.
    """
    model = copy_of(model)
    check_contract(model, input_size=input_size(model))
    shape = onnx.shape_inference.infer_shapes(model).graph.output[3].type.tensor_type.shape.dim
    rows, columns = (int(d.dim_value) for d in shape[1:])
    return PrecisionGraph(
        precision,
        model_bytes(model),
        remainder,
        opset=max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        higher_precision_layers=dict(kept),
        evidence_shape=(rows, columns),
        builder=builder,
    )
