"""Bootstrap intervals that resample original pictures, so that crops of one picture do not count as independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import CalibrationSpec
from train.metrics import Array, Labels

MIN_ORIGINALS = 10  # below it, percentiles of resampled originals are far too narrow to be shown
METRICS = ("ap", "auc", "accuracy_at_half", "accuracy_at_threshold", "real_flagged_rate", "fake_missed_rate")
_CHUNK_CELLS = 4_000_000  # weights held at a time, draws times pictures

Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Central interval over the draws."""

    low: float
    high: float


class OriginalsBootstrap:
    """One set of resampled originals for all figures of a collection, so that means over its parts are joint.

    Args:
        originals: (N,) the original of each picture.
        draws: number of resamplings.
        seed: of the resamplings.
    """

    def __init__(self, originals: Sequence[str], *, draws: int = 1000, seed: int = 0) -> None:
        names, self._index = np.unique(np.asarray(originals, dtype=np.str_), return_inverse=True)
        chances = np.full(len(names), 1.0 / len(names))
        rng = np.random.default_rng(seed)
        self._times = rng.multinomial(len(names), chances, size=draws).astype(np.uint16)

    def draws_of(
        self, logits: Array, labels: Labels, rows: NDArray[np.intp], calibration: CalibrationSpec
    ) -> dict[str, Draws] | None:
        """Each metric of `METRICS` in each draw, (draws,) with NaN where a draw leaves it undefined.

        Args:
            logits: (N,) float.
            labels: (N,) int, 0 real, 1 fake.
            rows: which of the N pictures form the set.
            calibration: gives the thresholds.

        Returns:
            None where the set has fewer than `MIN_ORIGINALS` originals.
        """
        index = self._index[rows]
        if len(np.unique(index)) < MIN_ORIGINALS:
            return None
        chunk = max(1, _CHUNK_CELLS // len(rows))
        parts = [
            weighted_metrics(logits[rows], labels[rows], times[:, index].astype(np.float64), calibration)
            for times in np.split(self._times, range(chunk, len(self._times), chunk))
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def interval(draws: Draws, *, level: float = 0.95) -> Interval | None:
    """Central interval of the defined draws; None where more than one in twenty is undefined."""
    defined = draws[np.isfinite(draws)]
    if len(defined) < 0.95 * len(draws) or not len(defined):
        return None
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(low), float(high))


def weighted_metrics(logits: Array, labels: Labels, weights: Draws, calibration: CalibrationSpec) -> dict[str, Draws]:
    """The metrics of `METRICS` under many weightings at once, which scikit-learn can only do one by one.

    Args:
        logits: (N,) float.
        labels: (N,) int, 0 real, 1 fake.
        weights: (D, N) how often each picture counts.
        calibration: gives the thresholds.

    Returns:
        (D,) for each metric, NaN where undefined.
    """
    order = np.argsort(-logits, kind="stable")
    scores, labels, weights = np.asarray(logits, np.float64)[order], labels[order], weights[:, order]
    last_of_ties = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    real, fake = weights * (labels == 0), weights * (labels == 1)
    found = np.pad(np.cumsum(fake, axis=1)[:, last_of_ties], ((0, 0), (1, 0)))
    flagged = np.pad(np.cumsum(real, axis=1)[:, last_of_ties], ((0, 0), (1, 0)))
    reals, fakes = flagged[:, -1], found[:, -1]
    called_at_half, called = scores > 0.0, scores > calibration.fake_threshold
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(found[:, 1:] / (found[:, 1:] + flagged[:, 1:]))
        steps = np.diff(found, axis=1)
        under = (np.diff(flagged, axis=1) * (found[:, :-1] + found[:, 1:]) / 2).sum(axis=1)
        undefined = np.where((reals > 0) & (fakes > 0), 0.0, np.nan)
        flagged_at_half, missed_at_half = real @ called_at_half, fake @ ~called_at_half
        flagged_now, missed_now = real @ called, fake @ ~called
        return {
            "ap": (steps * precision).sum(axis=1) / fakes + undefined,
            "auc": under / (reals * fakes) + undefined,
            "accuracy_at_half": 1.0 - (flagged_at_half + missed_at_half) / (reals + fakes),
            "accuracy_at_threshold": 1.0 - (flagged_now + missed_now) / (reals + fakes),
            "real_flagged_rate": flagged_now / reals,
            "fake_missed_rate": missed_now / fakes,
        }
