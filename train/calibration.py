"""How well stated probabilities and wanted rates hold on scored pictures, before and after calibration.

Temperature scaling and reliability: Guo et al. 2017 (arXiv:1706.04599). The two thresholds and their rules:
`train.metrics.real_flagged_threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from runtime.manifest import CalibrationSpec
from train.errors import ConfigError
from train.metrics import ECE_BINS, Array, Labels, needed_pictures, real_flagged_threshold
from train.validation_scores import ValidationScores

REAL_FLAGGED_RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
UNCALIBRATED = CalibrationSpec(1.0, 0.0, 0.0, 0.0, 0.5, 0.5)


@dataclass(frozen=True)
class ReliabilityBin:
    """Pictures whose probability of being fake lies in [low, high); the last bin holds 1 as well."""

    low: float
    high: float
    pictures: int
    mean_probability: float | None  # None in an empty bin
    fake_share: float | None


@dataclass(frozen=True)
class ProbabilityFigures:
    """How well probabilities hold; 0 is best in each.

    Attributes:
        ece: expected calibration error, from `bins`.
        brier: mean squared difference of probability and label.
        nll: mean negative log likelihood of the label, in nats.
        bins: `ECE_BINS` of equal width over 0..1.
    """

    ece: float
    brier: float
    nll: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Share:
    """A count as a share, with its 95 % Wilson interval, which takes pictures as independent."""

    share: float
    count: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class SetCalibration:
    """One set of scored pictures.

    Attributes:
        before: figures of sigmoid(logit).
        after: figures of the calibrated probability.
        real_covered: real pictures whose verdict is not `fake`; None without real pictures.
        fake_covered: fakes whose verdict is not `real`; None without fakes.
    """

    before: ProbabilityFigures
    after: ProbabilityFigures
    real_covered: Share | None
    fake_covered: Share | None


@dataclass(frozen=True)
class Reached:
    """What one threshold gives on one set of scored pictures; None where the class is missing."""

    real_flagged: Share | None
    fake_missed: Share | None


@dataclass(frozen=True)
class ThresholdRow:
    """One wanted rate.

    Attributes:
        wanted: share of real pictures flagged that the threshold was fitted for.
        needed: real validation pictures that this takes.
        threshold: raw logit; None where there were fewer.
        pooled: all scored pictures; None where there is no threshold.
        generators: each generator; empty where there is no threshold.
    """

    wanted: float
    needed: int
    threshold: float | None
    pooled: Reached | None
    generators: dict[str, Reached]


@dataclass(frozen=True)
class ThresholdTable:
    """Thresholds for other rates, fitted on the run's validation pictures by the run's rule."""

    validation_real: int
    validation_fake: int
    rows: tuple[ThresholdRow, ...]


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration on the scored pictures.

    Attributes:
        pooled: all pictures.
        generators: each generator, in the report's order.
        thresholds: None where the run did not keep its validation scores.
    """

    pooled: SetCalibration
    generators: dict[str, SetCalibration]
    thresholds: ThresholdTable | None


def check_rates(rates: Sequence[float]) -> None:
    """Refuse rates outside of (0, 1), or none at all.

    Raises:
        ConfigError: naming the option.
    """
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise ConfigError(
            "--real-flagged-rates",
            got=" ".join(f"{rate:g}" for rate in rates) or "nothing",
            wanted="shares between 0 and 1",
            remedy="change this option",
        )


def measure_calibration(
    logits: Array,
    labels: Labels,
    rows: Mapping[str, NDArray[np.intp]],
    calibration: CalibrationSpec,
    *,
    validation: ValidationScores | None,
    rates: Sequence[float] = REAL_FLAGGED_RATES,
) -> CalibrationReport:
    """Figures of scored pictures, pooled and by generator.

    Args:
        logits: (N,) float, raw logits of the scored pictures.
        labels: (N,) int, 0 real, 1 fake.
        rows: indices of each generator's pictures.
        calibration: of the run.
        validation: the run's validation scores, if it kept them.
        rates: wanted shares of real pictures flagged, each in (0, 1).
    """
    return CalibrationReport(
        pooled=_set_calibration(logits, labels, calibration),
        generators={name: _set_calibration(logits[i], labels[i], calibration) for name, i in rows.items()},
        thresholds=None if validation is None else _table(logits, labels, rows, calibration, validation, rates),
    )


def probability_figures(logits: Array, labels: Labels, calibration: CalibrationSpec) -> ProbabilityFigures:
    """How well the probabilities hold that a calibration makes of raw logits.

    Args:
        logits: (N,) float, N >= 1.
        labels: (N,) int, 0 real, 1 fake.
        calibration: gives temperature and bias.
    """
    probability, calibrated = calibration.fake_probability(logits), calibration.calibrated(logits)
    bins = reliability_bins(probability, labels)
    gaps = [b.pictures * abs(b.mean_probability - b.fake_share) for b in bins if b.pictures]
    return ProbabilityFigures(
        ece=float(sum(gaps) / len(labels)),
        brier=float(np.mean((probability - labels) ** 2)),
        # From the logit: the logarithm of a probability that was rounded to 0 or 1 is not finite.
        nll=float(np.mean(np.logaddexp(0.0, calibrated) - labels * calibrated)),
        bins=bins,
    )


def reliability_bins(probability: Array, labels: Labels, *, bins: int = ECE_BINS) -> tuple[ReliabilityBin, ...]:
    """Equal-width bins over 0..1, as `train.metrics.expected_calibration_error` counts them.

    Args:
        probability: (N,) float in 0..1 of being fake.
        labels: (N,) int, 0 real, 1 fake.
        bins: how many.
    """
    index = np.minimum((np.asarray(probability, np.float64) * bins).astype(np.int64), bins - 1)
    found = []
    for number in range(bins):
        inside = index == number
        count = int(inside.sum())
        mean = float(np.mean(probability[inside])) if count else None
        share = float(np.mean(labels[inside])) if count else None
        found.append(ReliabilityBin(number / bins, (number + 1) / bins, count, mean, share))
    return tuple(found)


def wilson_share(flags: NDArray[np.bool_]) -> Share | None:
    """Share of true flags (N,); None for none at all."""
    if not len(flags):
        return None
    count = int(flags.sum())
    interval = binomtest(count, len(flags)).proportion_ci(confidence_level=0.95, method="wilson")
    return Share(count / len(flags), count, len(flags), float(interval.low), float(interval.high))


def _set_calibration(logits: Array, labels: Labels, calibration: CalibrationSpec) -> SetCalibration:
    verdicts = calibration.verdicts(logits)
    return SetCalibration(
        before=probability_figures(logits, labels, UNCALIBRATED),
        after=probability_figures(logits, labels, calibration),
        real_covered=wilson_share(verdicts[labels == 0] != "fake"),
        fake_covered=wilson_share(verdicts[labels == 1] != "real"),
    )


def _table(
    logits: Array,
    labels: Labels,
    rows: Mapping[str, NDArray[np.intp]],
    calibration: CalibrationSpec,
    validation: ValidationScores,
    rates: Sequence[float],
) -> ThresholdTable:
    fitted_on, classes = validation.arrays()
    reals, rule = int((classes == 0).sum()), calibration.threshold_rule

    def row(rate: float) -> ThresholdRow:
        needed = needed_pictures(rate, rule)
        if reals < needed:
            return ThresholdRow(rate, needed, None, None, {})
        threshold = real_flagged_threshold(fitted_on, classes, rate=rate, rule=rule)
        reached = {name: _reached(logits[i], labels[i], threshold) for name, i in rows.items()}
        return ThresholdRow(rate, needed, threshold, _reached(logits, labels, threshold), reached)

    return ThresholdTable(reals, len(classes) - reals, tuple(row(rate) for rate in rates))


def _reached(logits: Array, labels: Labels, threshold: float) -> Reached:
    called = np.asarray(logits, np.float64) > threshold
    return Reached(wilson_share(called[labels == 0]), wilson_share(~called[labels == 1]))
