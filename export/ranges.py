"""Ranges of activations: how large each tensor gets on calibration pictures, and where INT8 clips it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from export.calibration import Batches
from export.errors import ExportError
from export.graph import copy_of, with_outputs
from export.session import open_session
from runtime.manifest import INPUT_NAME

HISTOGRAM_BINS = 2048
LEVELS = 127  # positive steps of a symmetric 8-bit integer
PERCENTILE = 99.99
# Smallest share of the largest magnitude that a clip is looked for at.
SMALLEST_SHARE = 0.3

Counts = NDArray[np.float64]
Calibrator = Callable[[Counts, float], float]


def largest_magnitudes(model: ModelProto, tensors: Iterable[str], batches: Batches) -> dict[str, float]:
    """Largest absolute value of each tensor over all pictures.

    Args:
        model: graph with the input `images`.
        tensors: names of float32 activations.
        batches: gives the pictures, afresh at each call.

    Raises:
        ExportError: a tensor is not finite on some picture.
    """
    names = list(tensors)
    session = open_session(_with_magnitudes(model, names))
    largest = np.zeros(len(names))
    for images in batches():
        found = session.run([f"{name}.magnitude" for name in names], {INPUT_NAME: images})
        largest = np.fmax(largest, np.array(found).reshape(-1))
        if not np.isfinite(np.array(found)).all():
            worst = names[int(np.argmin(np.isfinite(np.array(found)).reshape(-1)))]
            raise ExportError(
                f"tensor {worst}",
                got="infinity or NaN on a calibration picture",
                wanted="finite values",
                remedy="the trained weights are damaged; train again or use an earlier checkpoint",
            )
    return dict(zip(names, largest.tolist(), strict=True))


def magnitude_histograms(
    model: ModelProto, largest: dict[str, float], batches: Batches
) -> dict[str, NDArray[np.float64]]:
    """How often each magnitude occurs: HISTOGRAM_BINS counts from 0 to the tensor's largest magnitude.

    Args:
        model: graph with the input `images`.
        largest: largest magnitude by tensor name, from `largest_magnitudes`.
        batches: the same pictures.

    Note:
        Memory: the feature maps of one batch.
    """
    names = list(largest)
    session = open_session(with_outputs(model, names))
    counts = {name: np.zeros(HISTOGRAM_BINS) for name in names}
    for images in batches():
        for name, values in zip(names, session.run(names, {INPUT_NAME: images}), strict=True):
            scale = HISTOGRAM_BINS / max(largest[name], float(np.finfo(np.float32).tiny))
            bins = np.minimum(np.abs(values).ravel() * scale, HISTOGRAM_BINS - 1).astype(np.int32)
            counts[name] += np.bincount(bins, minlength=HISTOGRAM_BINS)
    return counts


def smallest_squared_error(counts: Counts, largest: float) -> float:
    """Clip at which rounding and clipping together lose least in squared error.

    Args:
        counts: histogram of the magnitudes from 0 to `largest`.
        largest: upper edge of the last bin.
    """
    centers = (np.arange(len(counts)) + 0.5) * (largest / len(counts))
    shares = np.linspace(SMALLEST_SHARE, 1.0, 71)
    errors = []
    for share in shares:
        step = share * largest / LEVELS
        rebuilt = np.minimum(np.round(centers / step), LEVELS) * step
        errors.append(float(counts @ (rebuilt - centers) ** 2))
    return float(shares[int(np.argmin(errors))] * largest)


def smallest_divergence(counts: Counts, largest: float) -> float:
    """Clip at which the 8-bit histogram tells least apart from the clipped one (Kullback-Leibler).

    Migacz 2017, "8-bit inference with TensorRT": values beyond the clip are counted in its last bin, and each of the
    LEVELS + 1 steps spreads its count over the bins that were filled.

    Args:
        counts: histogram of the magnitudes from 0 to `largest`.
        largest: upper edge of the last bin.
    """
    steps = LEVELS + 1
    counts = counts.copy()
    counts[0] = counts[1]  # zeros of a ReLU are exact at every scale and say nothing about it
    ends = np.arange(steps, len(counts) + 1, 8)
    ends = ends[ends >= SMALLEST_SHARE * len(counts)]
    divergences = [_divergence(counts, int(end), steps) for end in ends]
    return float(ends[int(np.argmin(divergences))]) / len(counts) * largest


def percentile(counts: Counts, largest: float) -> float:
    """Magnitude that PERCENTILE percent of the values keep within, to the histogram's resolution.

    Args:
        counts: histogram of the magnitudes from 0 to `largest`.
        largest: upper edge of the last bin.
    """
    reached = np.cumsum(counts) >= PERCENTILE / 100 * counts.sum()
    return float(np.argmax(reached) + 1) / len(counts) * largest


def whole_range(counts: Counts, largest: float) -> float:
    """The largest magnitude: nothing is clipped.

    Args:
        counts: not looked at.
        largest: upper edge of the last bin.
    """
    return largest


CALIBRATORS: Mapping[str, Calibrator] = {
    "mse": smallest_squared_error,
    "entropy": smallest_divergence,
    "percentile": percentile,
    "minmax": whole_range,
}


def clipped_ranges(calibrator: str, counts: Mapping[str, Counts], largest: Mapping[str, float]) -> dict[str, float]:
    """Magnitude at which each tensor is clipped; 1 for a tensor that is always zero.

    Args:
        calibrator: one of CALIBRATORS.
        counts: from `magnitude_histograms`.
        largest: from `largest_magnitudes`, for the same tensors at least.
    """
    choose = CALIBRATORS[calibrator]
    return {name: choose(counts[name], largest[name]) if largest[name] > 0 else 1.0 for name in counts}


def _divergence(counts: Counts, end: int, steps: int) -> float:
    kept = counts[:end].copy()
    kept[-1] += counts[end:].sum()
    filled = counts[:end] > 0
    step = np.minimum((np.arange(end) * steps) // end, steps - 1)
    members = np.bincount(step[filled], minlength=steps)
    sums = np.bincount(step, weights=counts[:end], minlength=steps)
    spread = np.where(filled, (sums / np.maximum(members, 1))[step], 0.0)
    p, q = kept / kept.sum(), spread / max(spread.sum(), np.finfo(float).tiny)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))


def _with_magnitudes(model: ModelProto, names: list[str]) -> ModelProto:
    seen = copy_of(model)
    for name in names:
        inner, outer = f"{name}.absolute", f"{name}.magnitude"
        seen.graph.node.append(onnx.helper.make_node("Abs", [name], [inner]))
        seen.graph.node.append(onnx.helper.make_node("ReduceMax", [inner], [outer], keepdims=0))
    return with_outputs(seen, [f"{name}.magnitude" for name in names])
