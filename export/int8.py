"""The INT8 graph that keeps within the accuracy budget: which calibrator, and which layers stay in floating point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto

from export.budget import Cost
from export.calibration import Batches, PreparedPictures
from export.errors import ExportError
from export.graph import initializers, model_bytes
from export.judge import Candidate, Judge
from export.parity import Logits
from export.quantize import (
    LayerError,
    QuantizationPlan,
    bias_corrections,
    float_layers,
    int8_from_fp32,
    layer_errors,
    plan_quantization,
    quantized_tensors,
)
from export.ranges import CALIBRATORS, clipped_ranges, magnitude_histograms
from export.session import open_session
from runtime.manifest import INPUT_NAME

Say = Callable[[str], None]  # told what is being done

# Calibration pictures that choose the calibrator, and that each layer's own effect is measured on.
CHOICE_PICTURES = 48
SENSITIVITY_PICTURES = 32
BUDGET_REASON = "returned by the accuracy budget: alone in INT8 it changes the logits by {std:.3g} (standard deviation)"


@dataclass(frozen=True)
class LayerSensitivity:
    """What one node costs when it alone computes in INT8.

    Attributes:
        name: of the node.
        sqnr_db: signal to quantisation noise of its own output, decibels; None for an addition or a matrix product.
        logit_std: standard deviation of the logits' change over pictures.
        share: of the network's multiply-accumulate operations.
    """

    name: str
    sqnr_db: float | None
    logit_std: float
    share: float


@dataclass(frozen=True)
class Step:
    """One graph that was judged.

    Attributes:
        returned: how many of the most sensitive nodes stay in floating point.
        int8_share: share of the multiply-accumulate operations that are integer.
        size_bytes: of the ONNX file.
        costs: on each back-end that was tried.
        excess: what is above the budget, in words; empty when it fits.
    """

    returned: int
    int8_share: float
    size_bytes: int
    costs: tuple[Cost, ...]
    excess: tuple[str, ...]


@dataclass(frozen=True)
class Int8Search:
    """How the INT8 graph was found.

    Attributes:
        calibrators: standard deviation of the logits' change, by calibrator, with corrected biases.
        calibrator: the one with the smallest.
        sensitivities: by sensitivity, largest first; empty when the whole plan keeps within the budget.
        steps: the graphs that were judged, in order.
        returned: nodes that stay in floating point because of the budget, with the reason.
    """

    calibrators: dict[str, float]
    calibrator: str
    sensitivities: tuple[LayerSensitivity, ...]
    steps: tuple[Step, ...]
    returned: dict[str, str]


class BudgetError(ExportError):
    """No INT8 graph that is worth its name keeps within the budget; `search` says what was tried."""

    search: Int8Search


@dataclass(frozen=True)
class Quantizer:
    """Makes the INT8 graph of any part of a plan, with ranges and bias corrections that were measured once.

    Attributes:
        calibrator: that chose the ranges.
        model: FP32 graph.
        plan: the whole plan.
        ranges: magnitude at which each tensor is clipped.
        errors: of each quantised convolution by itself.
    """

    calibrator: str
    model: ModelProto
    plan: QuantizationPlan
    ranges: dict[str, float]
    errors: dict[str, LayerError]

    def graph(self, plan: QuantizationPlan) -> ModelProto:
        """INT8 graph of a part of the plan."""
        return int8_from_fp32(self.model, plan, self.ranges, bias_corrections(self.errors))


def int8_within_budget(
    model: ModelProto,
    largest: Mapping[str, float],
    pictures: PreparedPictures,
    judge: Judge,
    *,
    for_engines: Callable[[ModelProto], ModelProto],
    calibrator: str = "auto",
    smallest_share: float = 0.5,
    say: Say = lambda message: None,
) -> tuple[ModelProto, Int8Search]:
    """INT8 graph, as much of it in integers as the budget of `judge` allows, and how it was found.

    The most sensitive nodes go back to floating point, few at first; the smallest number that fits is looked for
    between the last that did not fit and the first that did.

    Args:
        model: FP32 graph with folded batch norms.
        largest: largest magnitude of each activation on the calibration pictures.
        pictures: calibration pictures.
        judge: says what a graph costs.
        for_engines: makes the twin with an FP16 remainder, which has to keep within the budget as well.
        calibrator: one of CALIBRATORS, or "auto" for the one that changes the logits least.
        smallest_share: of the multiply-accumulate operations that must stay in INT8.
        say: told what is being done.

    Raises:
        BudgetError: no graph with that share keeps within the budget.
        ExportError: there is nothing to quantise, or not that much.
    """
    plan = plan_quantization(model, float_layers(model))
    if not plan.layers:
        raise ExportError(
            "INT8",
            got="a graph without a convolution or matrix product that could compute in integers",
            wanted="at least one",
            remedy="ship FP16: python -m export.trt --fp16",
        )
    work = operations(model)
    largest_share = int8_share(plan, work)
    if not 0 <= smallest_share <= largest_share:
        raise ExportError(
            "--int8-share",
            got=f"{smallest_share:g}",
            wanted=f"0 to {largest_share:.3f}, the share that this network has outside its first and last layers",
            remedy="choose a smaller share",
        )
    quantizer, changes = choose_calibrator(model, plan, largest, pictures, calibrator, say)
    search = _Search(quantizer, judge, for_engines, work, say)
    sensitivities: tuple[LayerSensitivity, ...] = ()
    fitting = search.step(plan, 0)
    if fitting is None:
        say(f"over budget: measuring {len(plan.units)} layers by themselves")
        sensitivities = layer_sensitivities(quantizer, work, pictures)
        fitting = search.fewest(plan, [layer.name for layer in sensitivities], smallest_share)
    returned = {layer.name: BUDGET_REASON.format(std=layer.logit_std) for layer in sensitivities[: fitting or 0]}
    found = Int8Search(changes, quantizer.calibrator, sensitivities, tuple(search.steps), returned)
    if fitting is None:
        raise budget_error(found, smallest_share)
    return quantizer.graph(plan.without(returned)), found


class _Search:
    """The graphs that were judged so far, by the number of nodes that are returned."""

    def __init__(
        self,
        quantizer: Quantizer,
        judge: Judge,
        for_engines: Callable[[ModelProto], ModelProto],
        work: Mapping[str, int],
        say: Say,
    ) -> None:
        self.quantizer, self.judge, self.for_engines, self.work, self.say = quantizer, judge, for_engines, work, say
        self.steps: list[Step] = []

    def fewest(self, plan: QuantizationPlan, order: list[str], smallest_share: float) -> int | None:
        """Smallest number of the first nodes of `order` that must be returned; None where too little would be left."""
        most = max(n for n in range(len(order) + 1) if int8_share(plan.without(order[:n]), self.work) >= smallest_share)
        failed, count = 0, min(1, most)
        while count > failed:
            if self.step(plan.without(order[:count]), count) is not None:
                return self._between(plan, order, failed, count)
            failed, count = count, min(count * 2, most)
        return None

    def _between(self, plan: QuantizationPlan, order: list[str], failed: int, fitting: int) -> int:
        while fitting - failed > 1:
            middle = (failed + fitting) // 2
            if self.step(plan.without(order[:middle]), middle) is None:
                failed = middle
            else:
                fitting = middle
        return fitting

    def step(self, plan: QuantizationPlan, returned: int) -> int | None:
        """Judge a graph; `returned` where it fits, else None."""
        model = self.quantizer.graph(plan)
        content = model_bytes(model)
        twin = Candidate("int8", model_bytes(self.for_engines(model)), "fp16")
        costs = self.judge.costs([Candidate("int8", content), twin])
        excess = tuple(f"{what} on {cost.backend}" for cost in costs for what in cost.excess(self.judge.budget))
        self.steps.append(Step(returned, int8_share(plan, self.work), len(content), costs, excess))
        self.say(step_line(self.steps[-1]))
        return None if excess else returned


def choose_calibrator(
    model: ModelProto,
    plan: QuantizationPlan,
    largest: Mapping[str, float],
    pictures: PreparedPictures,
    calibrator: str,
    say: Say,
) -> tuple[Quantizer, dict[str, float]]:
    """Ranges and corrections of the calibrator that changes the logits least, and that change for each that was tried.

    Args:
        model: FP32 graph.
        plan: where Q/DQ nodes go.
        largest: largest magnitude of each activation.
        pictures: calibration pictures.
        calibrator: one of CALIBRATORS, or "auto" for all of them.
        say: told the outcome.
    """
    clipped = {name: largest[name] for name in quantized_tensors(model, plan)}
    counts = magnitude_histograms(model, clipped, pictures.batches)
    few = pictures.evenly_spaced(CHOICE_PICTURES).batches
    wanted = scored_logits(model, few)
    changes: dict[str, float] = {}
    for name in CALIBRATORS if calibrator == "auto" else (calibrator,):
        ranges = clipped_ranges(name, counts, clipped)
        corrections = bias_corrections(layer_errors(model, plan, ranges, few))
        quantized = int8_from_fp32(model, plan, ranges, corrections)
        changes[name] = float(np.std(scored_logits(quantized, few) - wanted, dtype=np.float64))
    best = min(changes, key=lambda name: changes[name])
    say(f"ranges by {best}; change of the logits: " + ", ".join(f"{n} {v:.3f}" for n, v in changes.items()))
    ranges = clipped_ranges(best, counts, clipped)
    return Quantizer(best, model, plan, ranges, layer_errors(model, plan, ranges, pictures.batches)), changes


def layer_sensitivities(
    quantizer: Quantizer, work: Mapping[str, int], pictures: PreparedPictures
) -> tuple[LayerSensitivity, ...]:
    """Every node of the plan by what it does to the logits when it alone is quantised, largest first.

    A shift that all pictures share is not counted: thresholds and bias are fitted to the finished graph.
    """
    few = pictures.evenly_spaced(SENSITIVITY_PICTURES).batches
    wanted = scored_logits(quantizer.model, few)
    total = max(1, sum(work.values()))
    found = []
    for name in quantizer.plan.units:
        alone = quantizer.graph(quantizer.plan.only([name]))
        error = quantizer.errors.get(name)
        change = float(np.std(scored_logits(alone, few) - wanted, dtype=np.float64))
        found.append(
            LayerSensitivity(name, None if error is None else error.sqnr_db, change, work.get(name, 0) / total)
        )
    return tuple(sorted(found, key=lambda layer: -layer.logit_std))


def operations(model: ModelProto) -> dict[str, int]:
    """Multiply-accumulate operations a picture of each node with stored weights, by name."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = (*inferred.graph.value_info, *inferred.graph.output)
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in values}
    weights = initializers(model)
    counted = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        dims = weights[node.input[1]].dims
        # Conv: (out, in / groups, kernel...); a matrix product sums over all but the channels that come out.
        summed = int(np.prod(dims[1:])) if node.op_type == "Conv" else int(np.prod(dims)) // shapes[node.output[0]][-1]
        counted[node.name] = int(np.prod(shapes[node.output[0]])) * summed
    return counted


def int8_share(plan: QuantizationPlan, work: Mapping[str, int]) -> float:
    """Share of the multiply-accumulate operations (`operations`) that a plan computes in integers."""
    return sum(work.get(name, 0) for name in plan.layers) / max(1, sum(work.values()))


def scored_logits(model: ModelProto, batches: Batches) -> Logits:
    """Logits (N,) of a graph in ONNX Runtime."""
    session = open_session(model)
    return np.concatenate([session.run(["logits"], {INPUT_NAME: images})[0] for images in batches()])


def step_line(step: Step) -> str:
    """What was judged and what came out, in a line."""
    last = step.costs[-1]
    verdict = "; ".join(step.excess) or "within the budget"
    return (
        f"{step.returned} layers returned, {step.int8_share:.0%} of the operations in INT8: AP {-last.worst_ap:+.2f}, "
        f"flips {last.flips:.2f} points on {last.backend}: {verdict}"
    )


def budget_error(search: Int8Search, smallest_share: float) -> BudgetError:
    """The refusal, with the search that led to it."""
    last = search.steps[-1]
    error = BudgetError(
        "INT8",
        got=f"with {last.returned} layers returned to floating point still {', '.join(last.excess)}",
        wanted=f"a graph within the budget that computes at least {smallest_share:.0%} in integers",
        remedy="ship FP16 (--fp16), allow more (--budget-flips, --budget-ap, ...) or fewer integers"
        " (--int8-share), or give more calibration pictures",
    )
    error.search = search
    return error
