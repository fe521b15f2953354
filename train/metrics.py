"""Metrics of a detector, its thresholds and its calibration; undefined figures are None, never NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from runtime.manifest import CalibrationSpec, ThresholdRule
from train.errors import DataError

Array = NDArray[np.floating]
Labels = NDArray[np.integer]

ECE_BINS = 15  # Guo et al. 2017 (arXiv:1706.04599), section 4
_COUNT_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary


@dataclass(frozen=True)
class DetectionMetrics:
    """Figures of one set of pictures; rates and scores in 0..1, None where a class is missing.

    Attributes:
        ap: average precision, fake as the positive class.
        auc: area under the ROC curve.
        accuracy_at_half: accuracy where the uncalibrated probability is cut at 0.5, as papers report it.
        accuracy_at_calibrated_half: the same for the calibrated probability.
        accuracy_at_threshold: accuracy where only the verdict `fake` counts as fake (validation threshold).
        real_flagged_rate: share of real pictures with the verdict `fake`.
        fake_missed_rate: share of fake pictures without the verdict `fake`.
        real_flagged_rate_at_half: share of real pictures called fake at the uncalibrated 0.5.
        fake_missed_rate_at_half: share of fake pictures called real at the uncalibrated 0.5.
        uncertain_rate: share of all pictures with the verdict `uncertain`.
        tpr_at_1pct_real_flagged: largest share of fakes found while at most 1 % of these real pictures are
            flagged.
        tpr_at_5pct_real_flagged: the same for 5 %.
        eer: rate at which real flagged and fake missed are equal.
        ece_uncalibrated: expected calibration error of sigmoid(logit).
        ece_calibrated: expected calibration error of the calibrated probability.
    """

    pictures: int
    real: int
    fake: int
    ap: float | None
    auc: float | None
    accuracy_at_half: float
    accuracy_at_calibrated_half: float
    accuracy_at_threshold: float
    real_flagged_rate: float | None
    fake_missed_rate: float | None
    real_flagged_rate_at_half: float | None
    fake_missed_rate_at_half: float | None
    uncertain_rate: float
    tpr_at_1pct_real_flagged: float | None
    tpr_at_5pct_real_flagged: float | None
    eer: float | None
    ece_uncalibrated: float
    ece_calibrated: float


def real_flagged_threshold(
    logits: Array, labels: Labels, *, rate: float = 0.01, rule: ThresholdRule = "empirical"
) -> float:
    """Smallest logit threshold that flags at most `rate` of the real images.

    Args:
        logits: (N,) float, larger means more likely fake, any scale.
        labels: (N,) int, 0 real, 1 fake.
        rate: wanted share of real images called fake, in (0, 1).
        rule: of which images: these themselves ("empirical"), or, in expectation, new ones that are exchangeable with
            these ("conformal": the k-th smallest logit of n real images, k = ceil((n + 1) (1 - rate)), which is
            class-conditional split conformal prediction: Vovk et al. 2005; Angelopoulos & Bates, arXiv:2107.07511).

    Returns:
        Threshold in logit units; an image is called fake when its logit is strictly above it.

    Raises:
        ValueError: no real image, or too few of them to resolve `rate`.
    """
    real = np.sort(_of_class(logits, labels, 0, rate, rule))
    return float(real[-1 - _allowed(len(real), rate, rule)])


def fake_missed_threshold(
    logits: Array, labels: Labels, *, rate: float = 0.05, rule: ThresholdRule = "empirical"
) -> float:
    """Largest logit threshold that lets at most `rate` of the fake images pass as real.

    Args:
        logits: (N,) float, larger means more likely fake, any scale.
        labels: (N,) int, 0 real, 1 fake.
        rate: wanted share of fake images called real, in (0, 1).
        rule: as in `real_flagged_threshold`, mirrored: conformal takes the k-th largest logit of the fake images.

    Returns:
        Threshold in logit units; an image is called real when its logit is at or below it. It is the largest
        number of the logits' own type, so it means the same after a round trip through float64 and JSON.

    Raises:
        ValueError: no fake image, or too few of them to resolve `rate`.
    """
    fake = np.sort(_of_class(logits, labels, 1, rate, rule))
    first_found = fake[_allowed(len(fake), rate, rule)]
    return float(np.nextafter(first_found, fake.dtype.type(-np.inf)))


def fit_calibration(
    logits: Array,
    labels: Labels,
    *,
    real_flagged_rate: float = 0.01,
    fake_missed_rate: float = 0.05,
    rule: ThresholdRule = "empirical",
) -> CalibrationSpec:
    """Temperature, bias and both verdict thresholds, fitted on validation pictures.

    The temperature is that of Guo et al. 2017 (arXiv:1706.04599), section 4.2, fitted with Platt's bias (Platt 1999).

    Args:
        logits: (N,) float, raw logits of validation pictures, larger means more likely fake.
        labels: (N,) int, 0 real, 1 fake; both classes.
        real_flagged_rate: wanted share of real pictures with the verdict `fake`.
        fake_missed_rate: wanted share of fake pictures with the verdict `real`.
        rule: on which pictures the rates are kept, see `real_flagged_threshold`.

    Raises:
        DataError: one class only, too few pictures for the rates, or logits that do not rise with the label.

    Note:
        The probabilities hold for the share of fakes in the validation pictures; other shares shift them all.
    """
    flagged, missed = _thresholds(logits, labels, real_flagged_rate, fake_missed_rate, rule)
    slope, bias = _platt(np.asarray(logits, np.float64), np.asarray(labels))
    if not slope > 0:
        raise DataError(
            "calibration",
            got=f"a slope of {slope:.3g} between logit and label",
            wanted="logits that rise from real to fake",
            remedy="train longer, or check that the labels are 0 real, 1 fake",
        )
    return CalibrationSpec(
        temperature=1.0 / slope,
        bias=bias,
        real_threshold=min(missed, flagged),
        fake_threshold=flagged,
        real_flagged_rate=real_flagged_rate,
        fake_missed_rate=fake_missed_rate,
        threshold_rule=rule,
    )


def require_calibration_pictures(
    labels: Labels, *, real_flagged_rate: float, fake_missed_rate: float, rule: ThresholdRule = "empirical"
) -> None:
    """Refuse, before anything is trained, validation pictures that `fit_calibration` will refuse.

    Raises:
        DataError: one class only, or too few pictures for the rates.
    """
    _thresholds(np.zeros(len(labels)), labels, real_flagged_rate, fake_missed_rate, rule)


def _thresholds(
    logits: Array, labels: Labels, real_flagged_rate: float, fake_missed_rate: float, rule: ThresholdRule
) -> tuple[float, float]:
    try:
        return (
            real_flagged_threshold(logits, labels, rate=real_flagged_rate, rule=rule),
            fake_missed_threshold(logits, labels, rate=fake_missed_rate, rule=rule),
        )
    except ValueError as error:
        raise DataError(
            "calibration",
            got=str(error),
            wanted=f"enough validation pictures for rates of {real_flagged_rate:g} and {fake_missed_rate:g}",
            remedy="add validation pictures, or choose larger rates with --real-flagged-rate and --fake-missed-rate",
        ) from error


def needed_pictures(rate: float, rule: ThresholdRule = "empirical") -> int:
    """Smallest number of pictures of a class that resolves a rate: n * rate >= 1, conformal (n + 1) * rate >= 1."""
    whole = math.ceil(1.0 / rate - _COUNT_SLACK)
    return max(1, whole - 1) if rule == "conformal" else whole


def detection_metrics(logits: Array, labels: Labels, *, calibration: CalibrationSpec) -> DetectionMetrics:
    """All figures of one set of pictures.

    Args:
        logits: (N,) float, raw logits, N >= 1.
        labels: (N,) int, 0 real, 1 fake; one class alone is allowed.
        calibration: fitted on validation pictures, never on these.

    Raises:
        ValueError: no picture, shapes that differ, labels other than 0 and 1, or logits that are not finite.
    """
    logits, labels = _checked(logits, labels)
    scores = logits.astype(np.float64)
    real, fake = labels == 0, labels == 1
    both = bool(real.any() and fake.any())
    verdicts = calibration.verdicts(logits)
    called, called_at_half = verdicts == "fake", scores > 0.0
    probability = calibration.fake_probability(logits)
    curve = _curve(scores, labels) if both else None
    return DetectionMetrics(
        pictures=len(labels),
        real=int(real.sum()),
        fake=int(fake.sum()),
        ap=float(average_precision_score(labels, scores)) if both else None,
        auc=float(roc_auc_score(labels, scores)) if both else None,
        accuracy_at_half=_share(called_at_half == fake),
        accuracy_at_calibrated_half=_share((probability > 0.5) == fake),
        accuracy_at_threshold=_share(called == fake),
        real_flagged_rate=_share(called[real]) if real.any() else None,
        fake_missed_rate=_share(~called[fake]) if fake.any() else None,
        real_flagged_rate_at_half=_share(called_at_half[real]) if real.any() else None,
        fake_missed_rate_at_half=_share(~called_at_half[fake]) if fake.any() else None,
        uncertain_rate=_share(verdicts == "uncertain"),
        tpr_at_1pct_real_flagged=_tpr_at(curve, 0.01) if curve else None,
        tpr_at_5pct_real_flagged=_tpr_at(curve, 0.05) if curve else None,
        eer=_equal_error_rate(curve) if curve else None,
        ece_uncalibrated=expected_calibration_error(_sigmoid(scores), labels),
        ece_calibrated=expected_calibration_error(probability, labels),
    )


def expected_calibration_error(probability: Array, labels: Labels, *, bins: int = ECE_BINS) -> float:
    """Mean gap between stated probability and observed share of fakes, weighted by bin size.

    Args:
        probability: (N,) float in 0..1 of being fake, N >= 1.
        labels: (N,) int, 0 real, 1 fake.
        bins: number of equal-width bins over 0..1.
    """
    index = np.minimum((np.asarray(probability, np.float64) * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=np.asarray(probability, np.float64) - labels, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _platt(logits: NDArray[np.float64], labels: Labels) -> tuple[float, float]:
    """Slope and bias of Platt scaling (Platt 1999): smoothed targets keep separable data finite."""
    fakes = int((labels == 1).sum())
    reals = len(labels) - fakes
    target = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))
    centre, scale = float(logits.mean()), float(logits.std())
    if not scale:
        return 0.0, 0.0
    # A soft target t is one row as fake with weight t and one as real with weight 1 - t.
    rows = (np.concatenate([logits, logits])[:, None] - centre) / scale
    classes = np.repeat([1, 0], len(logits))
    weights = np.concatenate([target, 1 - target])
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", max_iter=200, tol=1e-8)
    model.fit(rows, classes, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / scale
    return slope, float(model.intercept_[0]) - slope * centre


def _curve(scores: NDArray[np.float64], labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Real-flagged rate and true-positive rate at every threshold, both rising."""
    flagged, found, _ = roc_curve(labels, scores, drop_intermediate=False)
    return flagged, found


def _tpr_at(curve: tuple[NDArray[np.float64], NDArray[np.float64]], rate: float) -> float:
    flagged, found = curve
    return float(found[flagged <= rate + _COUNT_SLACK].max())


def _equal_error_rate(curve: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
    """Where real-flagged and fake-missed rates cross, on straight lines between the measured points."""
    flagged, found = curve
    gap = flagged - (1.0 - found)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    step = gap[after] - gap[after - 1]
    weight = -gap[after - 1] / step
    return float(flagged[after - 1] + weight * (flagged[after] - flagged[after - 1]))


def _of_class(logits: Array, labels: Labels, label: int, rate: float, rule: ThresholdRule) -> Array:
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate must lie in (0, 1), got {rate:g}")
    logits, labels = _checked(logits, labels)
    chosen: Array = logits[labels == label]
    name = "fake" if label else "real"
    needed = needed_pictures(rate, rule)
    if len(chosen) < needed:
        raise ValueError(
            f"{len(chosen)} {name} images cannot resolve a rate of {rate:g}, {needed} are needed for {rule} thresholds"
        )
    return chosen


def _allowed(count: int, rate: float, rule: ThresholdRule) -> int:
    """Images beyond the threshold: the most that are `rate` of `count`; conformal, n - k = floor((n + 1) rate) - 1."""
    most = int(count * rate + _COUNT_SLACK) if rule == "empirical" else int((count + 1) * rate + _COUNT_SLACK) - 1
    return min(most, count - 1)


def _checked(logits: Array, labels: Labels) -> tuple[Array, Labels]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 1 or logits.shape != labels.shape or not len(logits):
        raise ValueError(f"logits and labels must both be (N,), N >= 1, got {logits.shape} and {labels.shape}")
    if not np.issubdtype(logits.dtype, np.floating):
        logits = logits.astype(np.float64)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (fake)")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).sum())} logits are not finite")
    return logits, labels.astype(np.int64)


def _share(flags: NDArray[np.bool_]) -> float:
    return float(np.mean(flags))


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))
