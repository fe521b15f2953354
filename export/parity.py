"""Comparison of a precision on a back-end with the PyTorch model, and the limits it must keep."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from export.onnx_export import torch_outputs
from runtime.backends import GRAPH_BACKENDS, Backend, open_backend, probe_backend
from runtime.manifest import CalibrationSpec, ModelManifest, ParitySpec, Precision
from train.metrics import detection_metrics
from train.model import NTFDetector

REFERENCE = "torch fp32"

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ParityLimits:
    """What a precision may differ from PyTorch. Improvements of AP and accuracy are not limited.

    Attributes:
        logit_diff_max: largest difference of one logit, in units of evidence (see `unit_of_evidence`).
        logit_diff_mean: mean difference of the logits, in the same unit.
        ap_loss_points: largest loss of average precision, in percentage points.
        accuracy_loss_points: largest loss of accuracy at the precision's own threshold, in percentage points.
        flipped_share: largest share of pictures whose verdict differs, into or out of `uncertain` included.
        opposite_share: largest share of pictures that one calls real and the other fake.
        reason: why these figures.

    Note:
        Shares are of all pictures that there could be; on the few that are compared, `largest_share` is allowed.
    """

    logit_diff_max: float
    logit_diff_mean: float
    ap_loss_points: float
    accuracy_loss_points: float
    flipped_share: float
    opposite_share: float
    reason: str


LIMITS: Mapping[str, ParityLimits] = {
    "fp32": ParityLimits(
        1e-2, 1e-3, 0.01, 0.0, 0.0, 0.0, "the same arithmetic in another order: only the last bits of a sum may move"
    ),
    "fp16": ParityLimits(
        0.5, 0.05, 0.2, 0.5, 0.01, 0.005, "11-bit rounding: a mean of 0.05 moves no probability by more than 1.3 points"
    ),
    "int8": ParityLimits(
        4.0,
        0.5,
        1.0,
        1.0,
        0.03,
        0.01,
        "8 bits may cost a point of AP and move pictures near a threshold into or out of `uncertain`, not across it",
    ),
}


def running_backends() -> list[str]:
    """Names of the back-ends that run here."""
    return [name for name in GRAPH_BACKENDS if probe_backend(name).runs]


@contextmanager
def opened_backends(
    graphs: Mapping[Precision, bytes], manifest: ModelManifest, names: Iterable[str]
) -> Iterator[dict[tuple[str, str], Backend]]:
    """Every graph opened on every back-end, by (precision, back-end); closed at the end.

    Args:
        graphs: content of the .onnx file of each precision.
        manifest: what the graphs are checked against.
        names: back-ends.
    """
    with ExitStack() as stack:
        pairs = [(precision, name) for precision in graphs for name in names]
        yield {
            (precision, name): stack.enter_context(
                closing(open_backend(name, graphs[precision], manifest, file=f"model.{precision}.onnx"))
            )
            for precision, name in pairs
        }


def collect_logits(
    detector: NTFDetector,
    backends: Mapping[tuple[str, str], Backend],
    batches: Iterable[NDArray[np.uint8]],
) -> tuple[Logits, dict[tuple[str, str], Logits]]:
    """Logits of PyTorch and of every back-end on the same pictures, which are decoded once.

    Args:
        detector: on the CPU, in evaluation mode.
        backends: from `opened_backends`.
        batches: prepared pictures.
    """
    reference: list[Logits] = []
    scored: dict[tuple[str, str], list[Logits]] = {key: [] for key in backends}
    for images in batches:
        reference.append(torch_outputs(detector, images)[0])
        for key, backend in backends.items():
            scored[key].append(backend.infer(images).logits)
    return np.concatenate(reference), {key: np.concatenate(parts) for key, parts in scored.items()}


def centred_thresholds(calibration: CalibrationSpec, logits: Logits) -> CalibrationSpec:
    """The same verdicts on `logits`, with each threshold in the middle between its neighbours.

    A threshold that is one picture's own logit flips that picture with the last bit of another back-end.

    Args:
        calibration: fitted on `logits`.
        logits: (N,) raw logits.
    """
    fake = _centred(calibration.fake_threshold, logits)
    real = fake
    if calibration.real_threshold < calibration.fake_threshold:
        real = min(fake, _centred(calibration.real_threshold, logits))
    return replace(calibration, real_threshold=real, fake_threshold=fake)


def matched_thresholds(calibration: CalibrationSpec, logits: Logits, wanted: NDArray[np.str_]) -> CalibrationSpec:
    """Thresholds that give most of the wanted verdicts among those that are at least as strict; each lies in a gap.

    A stricter threshold keeps the rate that it was fitted for: fewer real pictures are flagged, fewer fakes passed.

    Args:
        calibration: fitted on `logits`.
        logits: (N,) raw logits.
        wanted: (N,) verdicts to reproduce.
    """
    exact = logits.astype(np.float64)
    fake = _matched(calibration.fake_threshold, exact, wanted == "fake")
    # Mirrored, and a step further: a logit that is the threshold itself is called real.
    real = -_matched(-float(np.nextafter(calibration.real_threshold, np.inf)), -exact, wanted == "real")
    return replace(calibration, real_threshold=min(real, fake), fake_threshold=fake)


def compare_logits(
    logits: Logits,
    reference: Logits,
    labels: Labels,
    *,
    calibration: CalibrationSpec,
    reference_calibration: CalibrationSpec,
    backend: str,
    limits: ParityLimits,
) -> ParitySpec:
    """Figures of one precision on one back-end against PyTorch, each judged at its own threshold.

    Args:
        logits: (N,) raw logits of the artifact.
        reference: (N,) raw logits of PyTorch for the same pictures.
        labels: (N,) 0 real, 1 fake.
        calibration: of the artifact's precision.
        reference_calibration: of the PyTorch model.
        backend: name for the record.
        limits: what must hold.
    """
    difference = np.abs(logits.astype(np.float64) - reference)
    ours = detection_metrics(logits, labels, calibration=calibration)
    theirs = detection_metrics(reference, labels, calibration=reference_calibration)
    mine, wanted = calibration.verdicts(logits), reference_calibration.verdicts(reference)
    flipped = mine != wanted
    parity = ParitySpec(
        backend=backend,
        reference=REFERENCE,
        pictures=len(labels),
        logit_diff_max=float(difference.max()),
        logit_diff_mean=float(difference.mean()),
        ap_change_points=None if ours.ap is None or theirs.ap is None else 100.0 * (ours.ap - theirs.ap),
        accuracy_change_points=100.0 * (ours.accuracy_at_threshold - theirs.accuracy_at_threshold),
        verdict_flips=int(flipped.sum()),
        opposite_verdicts=int((flipped & (mine != "uncertain") & (wanted != "uncertain")).sum()),
        passed=False,
    )
    spread = float(np.std(reference))
    broken = broken_limits(parity, limits, calibration=reference_calibration, logit_std=spread)
    return replace(parity, passed=not broken)


def unit_of_evidence(calibration: CalibrationSpec, logit_std: float) -> float:
    """The raw logit difference that counts as 1 when precisions are compared.

    The temperature, so that a unit moves a probability near the middle by up to 25 points and models can be compared.
    Where the classes are nearly separable the fitted temperature goes towards 0 and says only that hardly any picture
    lies near the middle; there it is a quarter of the logits' standard deviation.

    Args:
        calibration: of the PyTorch model.
        logit_std: standard deviation of the PyTorch model's raw logits over the compared pictures.
    """
    return max(calibration.temperature, logit_std / 4)


def largest_share(limit: float, *, pictures: int) -> float:
    """Share of the pictures above which more than chance is at work, at least one picture.

    A precision that errs on exactly `limit` of all pictures shows more than this in one of a thousand verifications.

    Args:
        limit: share that is allowed, 0 to 1.
        pictures: how many were compared.
    """
    return max(1.0, float(binom.ppf(1 - 1e-3, pictures, limit))) / pictures


def broken_limits(
    parity: ParitySpec, limits: ParityLimits, *, calibration: CalibrationSpec, logit_std: float
) -> list[str]:
    """Each limit that a comparison breaks, in words; empty when it passes.

    Args:
        parity: the comparison.
        limits: what must hold.
        calibration: of the PyTorch model; where its thresholds leave no room for `uncertain`, every flip is an opposite
            verdict and is limited as a flip.
        logit_std: standard deviation of the PyTorch model's raw logits over the compared pictures.
    """
    unit = unit_of_evidence(calibration, logit_std)
    banded = calibration.real_threshold < calibration.fake_threshold
    opposite = limits.opposite_share if banded else limits.flipped_share
    most = functools.partial(largest_share, pictures=parity.pictures)
    checks = (
        ("largest logit difference", parity.logit_diff_max / unit, limits.logit_diff_max),
        ("mean logit difference", parity.logit_diff_mean / unit, limits.logit_diff_mean),
        ("AP loss in points", -(parity.ap_change_points or 0.0), limits.ap_loss_points),
        (
            "accuracy loss in points",
            -parity.accuracy_change_points,
            100 * most(limits.accuracy_loss_points / 100),
        ),
        ("share of verdicts flipped", parity.verdict_flips / parity.pictures, most(limits.flipped_share)),
        ("share of opposite verdicts", parity.opposite_verdicts / parity.pictures, most(opposite)),
    )
    # Written so that NaN breaks every limit.
    return [
        f"{what} {value:.4g}, at most {limit:.4g}" for what, value, limit in checks if not value <= limit * 1.000001
    ]


def _centred(threshold: float, logits: NDArray[np.floating]) -> float:
    below, above = logits[logits <= threshold], logits[logits > threshold]
    if not len(below) or not len(above):
        return threshold
    return (float(below.max()) + float(above.min())) / 2


def _matched(threshold: float, logits: NDArray[np.float64], above: NDArray[np.bool_]) -> float:
    """The gap at or above `threshold` that separates the logits marked `above` from the others with fewest errors."""
    gaps = [_centred(float(value), logits) for value in (threshold, *np.unique(logits[logits > threshold])[:-1])]
    errors = [int(((logits > gap) != above).sum()) for gap in gaps]
    return gaps[int(np.argmin(errors))]
