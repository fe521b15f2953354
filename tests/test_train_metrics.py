"""Metrics, thresholds and calibration against hand-computed cases and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from runtime.manifest import CalibrationSpec, ThresholdRule
from train.errors import DataError
from train.metrics import (
    detection_metrics,
    expected_calibration_error,
    fake_missed_threshold,
    fit_calibration,
    needed_pictures,
    real_flagged_threshold,
)

IDENTITY = CalibrationSpec(1.0, 0.0, -1.0, 1.0, 0.01, 0.05)


def two_classes(reals: int, fakes: int, *, seed: int = 0, gap: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = np.concatenate([rng.normal(0, 1, reals), rng.normal(gap, 1, fakes)]).astype(np.float32)
    return logits, np.repeat([0, 1], [reals, fakes])


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("count", [100, 101, 127, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_real_threshold_is_the_smallest_that_keeps_the_rate(rate: float, count: int, ties: bool) -> None:
    logits, labels = two_classes(count, 50)
    if ties:
        logits = np.round(logits, 1)
    threshold = real_flagged_threshold(logits, labels, rate=rate)
    real = logits[labels == 0]
    allowed = math.floor(rate * count + 1e-9)
    assert np.count_nonzero(real > threshold) <= allowed
    assert np.count_nonzero(real > np.nextafter(np.float32(threshold), np.float32(-np.inf))) > allowed


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.29, 0.5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fake_threshold_is_the_largest_that_keeps_the_rate(rate: float, ties: bool, dtype: type) -> None:
    logits, labels = two_classes(50, 127)
    logits = (np.round(logits, 1) if ties else logits).astype(dtype)
    threshold = fake_missed_threshold(logits, labels, rate=rate)
    fake, allowed = logits[labels == 1], math.floor(rate * 127)
    assert np.count_nonzero(fake <= threshold) <= allowed
    assert np.count_nonzero(fake.astype(np.float64) <= threshold) <= allowed
    assert np.count_nonzero(fake <= np.nextafter(dtype(threshold), dtype(np.inf))) > allowed


def test_thresholds_of_a_hand_computed_case() -> None:
    logits, labels = np.array([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]), np.repeat([0, 1], 4)
    assert real_flagged_threshold(logits, labels, rate=0.25) == 2.0
    assert 10.99 < fake_missed_threshold(logits, labels, rate=0.25) < 11.0


def test_conformal_thresholds_of_a_hand_computed_case() -> None:
    # Of 9 in each class at a rate of 0.2, k = ceil(10 * 0.8) = 8: one lies beyond, as with the empirical rule.
    logits, labels = np.arange(18.0), np.repeat([0, 1], 9)
    assert real_flagged_threshold(logits, labels, rate=0.2, rule="conformal") == 7.0
    assert 9.99 < fake_missed_threshold(logits, labels, rate=0.2, rule="conformal") < 10.0
    # At 0.3, k = 7, so two lie beyond. At 0.1, k = 9, so none does, where the empirical rule needs a tenth picture.
    assert real_flagged_threshold(logits, labels, rate=0.3, rule="conformal") == 6.0
    assert real_flagged_threshold(logits, labels, rate=0.1, rule="conformal") == 8.0
    assert 8.99 < fake_missed_threshold(logits, labels, rate=0.1, rule="conformal") < 9.0
    # Of 10 at 0.2, the empirical rule leaves two beyond, the conformal one k = ceil(11 * 0.8) = 9, that is one.
    ten, labels = np.arange(20.0), np.repeat([0, 1], 10)
    assert real_flagged_threshold(ten, labels, rate=0.2, rule="empirical") == 7.0
    assert real_flagged_threshold(ten, labels, rate=0.2, rule="conformal") == 8.0


def test_conformal_rule_keeps_the_rate_on_new_pictures_and_the_empirical_rule_does_not() -> None:
    # Uniform scores: a new one lies above the threshold t with chance 1 - t, so nothing has to be drawn for it.
    rng, labels, rate = np.random.default_rng(0), np.repeat([0, 1], 30), 0.1
    flagged: dict[str, list[float]] = {"empirical": [], "conformal": []}
    missed: dict[str, list[float]] = {"empirical": [], "conformal": []}
    for _ in range(1500):
        scores = rng.random(60)
        for rule in ("empirical", "conformal"):
            flagged[rule].append(1 - real_flagged_threshold(scores, labels, rate=rate, rule=rule))
            missed[rule].append(fake_missed_threshold(scores, labels, rate=rate, rule=rule))
    for chances in (flagged, missed):
        assert np.mean(chances["conformal"]) == pytest.approx(3 / 31, abs=0.006)  # k = ceil(31 * 0.9) = 28
        assert np.mean(chances["conformal"]) <= rate
        assert np.mean(chances["empirical"]) == pytest.approx(4 / 31, abs=0.006)  # three of 30 lie beyond


def test_conformal_rule_keeps_the_rate_where_scores_are_tied() -> None:
    rng, labels, rate = np.random.default_rng(1), np.repeat([0, 1], 30), 0.2
    flagged, missed = [], []
    for _ in range(1000):
        scores = rng.integers(0, 8, 60).astype(np.float64)  # eight values, equally likely
        above = real_flagged_threshold(scores, labels, rate=rate, rule="conformal")
        below = fake_missed_threshold(scores, labels, rate=rate, rule="conformal")
        flagged.append(np.mean(np.arange(8) > above))
        missed.append(np.mean(np.arange(8) <= below))
    assert 0.1 < np.mean(flagged) <= rate
    assert 0.1 < np.mean(missed) <= rate


@pytest.mark.parametrize(("rate", "rule", "needed"), [(0.01, "empirical", 100), (0.01, "conformal", 99),
                                                      (0.05, "conformal", 19), (0.3, "conformal", 3),
                                                      (0.99, "conformal", 1)])  # fmt: skip
def test_rate_is_resolved_from_the_stated_number_of_pictures_on(rate: float, rule: ThresholdRule, needed: int) -> None:
    assert needed_pictures(rate, rule) == needed
    assert np.isfinite(real_flagged_threshold(*two_classes(needed, 5), rate=rate, rule=rule))
    with pytest.raises(ValueError, match=rf"{needed} are needed for {rule} thresholds"):
        real_flagged_threshold(*two_classes(needed - 1, 5), rate=rate, rule=rule)


def test_calibration_says_which_rule_fitted_its_thresholds() -> None:
    logits, labels = two_classes(99, 99)
    with pytest.raises(DataError, match="99 real images cannot resolve"):
        fit_calibration(logits, labels)
    spec = fit_calibration(logits, labels, rule="conformal")
    assert spec.threshold_rule == "conformal"
    assert spec.fake_threshold == logits[labels == 0].max()
    assert fit_calibration(*two_classes(100, 100)).threshold_rule == "empirical"


def test_too_few_real_images_for_the_rate_are_refused() -> None:
    logits, labels = two_classes(99, 10)
    with pytest.raises(ValueError, match=r"99 real images cannot resolve a rate of 0.01, 100 are needed"):
        real_flagged_threshold(logits, labels, rate=0.01)
    assert np.isfinite(real_flagged_threshold(*two_classes(100, 10), rate=0.01))


def test_no_real_image_is_refused() -> None:
    with pytest.raises(ValueError, match="0 real images"):
        real_flagged_threshold(np.array([1.0]), np.array([1]), rate=0.5)


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, 2.0])
def test_rate_outside_zero_and_one_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\)"):
        fake_missed_threshold(*two_classes(9, 9), rate=rate)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 logits are not finite"):
        detection_metrics(np.array([0.0, np.nan]), np.array([0, 1]), calibration=IDENTITY)


def test_unknown_labels_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be 0"):
        detection_metrics(np.array([0.0, 1.0]), np.array([1, 2]), calibration=IDENTITY)
    with pytest.raises(ValueError, match=r"must both be \(N,\)"):
        detection_metrics(np.zeros(3), np.array([0, 1]), calibration=IDENTITY)


def test_calibration_is_platt_scaling_with_smoothed_targets() -> None:
    logits, labels = two_classes(200, 100)
    spec = fit_calibration(3.0 * logits - 7.0, labels)
    target = np.where(labels == 1, 101 / 102, 1 / 202)

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * (3.0 * logits.astype(np.float64) - 7.0) + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - target * z))

    oracle = minimize(loss, [0.3, 0.0], method="BFGS", options={"gtol": 1e-9})
    assert 1 / spec.temperature == pytest.approx(oracle.x[0], rel=1e-4)
    assert spec.bias == pytest.approx(oracle.x[1], rel=1e-4)


def test_calibration_of_separable_logits_stays_finite() -> None:
    logits, labels = np.linspace(-5, 5, 400), np.repeat([0, 1], 200)
    spec = fit_calibration(logits, labels)
    assert 0.01 < spec.temperature < 10
    assert spec.real_threshold <= spec.fake_threshold


def test_calibration_thresholds_keep_their_rates_on_the_fitted_pictures() -> None:
    logits, labels = two_classes(1000, 1000, gap=1.0)
    spec = fit_calibration(logits, labels, real_flagged_rate=0.02, fake_missed_rate=0.10)
    verdicts = spec.verdicts(logits)
    assert np.mean(verdicts[labels == 0] == "fake") == pytest.approx(0.02)
    assert np.mean(verdicts[labels == 1] == "real") == pytest.approx(0.10)
    assert set(verdicts) == {"real", "uncertain", "fake"}


def test_calibration_improves_the_calibration_error() -> None:
    logits, labels = two_classes(2000, 2000)
    spec = fit_calibration(10.0 * logits, labels)
    metrics = detection_metrics(10.0 * logits, labels, calibration=spec)
    assert metrics.ece_calibrated < 0.03 < 0.1 < metrics.ece_uncalibrated


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (*two_classes(99, 99), "99 real images cannot resolve a rate of 0.01"),
        (*two_classes(200, 0), "0 fake images"),
        (*two_classes(200, 200, gap=-2.0), "slope of -"),
        (np.zeros(400), np.repeat([0, 1], 200), "slope of 0"),
    ],
)
def test_calibration_that_cannot_be_fitted_is_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_calibration(logits, labels)


def test_every_rate_of_a_hand_computed_case() -> None:
    logits = np.array([-3.0, -2.0, 0.5, 2.0, -1.5, 0.2, 1.5, 4.0])
    m = detection_metrics(logits, np.repeat([0, 1], 4), calibration=IDENTITY)
    assert (m.pictures, m.real, m.fake) == (8, 4, 4)
    assert m.accuracy_at_half == 5 / 8  # wrong: 0.5, 2.0 and -1.5
    assert (m.real_flagged_rate_at_half, m.fake_missed_rate_at_half) == (2 / 4, 1 / 4)
    assert m.accuracy_at_threshold == 5 / 8  # above 1: 2.0 of the reals, 1.5 and 4.0 of the fakes
    assert (m.real_flagged_rate, m.fake_missed_rate) == (1 / 4, 2 / 4)
    assert m.uncertain_rate == 2 / 8
    # From the top: fake, real, fake, real, fake, fake, real, real.
    assert m.ap == pytest.approx((1 / 1 + 2 / 3 + 3 / 5 + 4 / 6) / 4)
    assert m.auc == pytest.approx((4 + 3 + 2 + 2) / 16)
    assert m.tpr_at_1pct_real_flagged == 1 / 4
    assert m.eer == 0.5


def test_equal_error_rate_is_interpolated() -> None:
    logits, labels = np.array([3.0, 2.0, 1.0, 0.0]), np.array([1, 0, 1, 1])
    assert detection_metrics(logits, labels, calibration=IDENTITY).eer == pytest.approx(2 / 3)


def test_perfect_and_reversed_rankings() -> None:
    labels = np.repeat([0, 1], 50)
    perfect = detection_metrics(labels * 2.0 - 1.0, labels, calibration=IDENTITY)
    reversed_ = detection_metrics(1.0 - labels * 2.0, labels, calibration=IDENTITY)
    assert (perfect.ap, perfect.auc, perfect.eer, perfect.tpr_at_1pct_real_flagged) == (1.0, 1.0, 0.0, 1.0)
    assert (reversed_.auc, reversed_.eer, reversed_.tpr_at_5pct_real_flagged) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_rates_but_no_ranking(label: int) -> None:
    m = detection_metrics(np.array([2.0, -2.0]), np.array([label, label]), calibration=IDENTITY)
    assert (m.ap, m.auc, m.eer, m.tpr_at_1pct_real_flagged) == (None, None, None, None)
    assert m.accuracy_at_half == 0.5
    assert (m.real_flagged_rate, m.fake_missed_rate) == ((0.5, None) if label == 0 else (None, 0.5))


def test_calibration_error_matches_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    probability, labels = rng.uniform(size=257), rng.integers(0, 2, 257)
    probability[:2] = 0.0, 1.0
    total = 0.0
    for low in range(15):
        inside = [i for i, p in enumerate(probability) if min(int(p * 15), 14) == low]
        if inside:
            total += len(inside) * abs(np.mean(probability[inside]) - np.mean(labels[inside]))
    assert expected_calibration_error(probability, labels) == pytest.approx(total / 257)
