"""Figures of a comparison, their limits, and thresholds that survive rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.parity import (
    LIMITS,
    broken_limits,
    centred_thresholds,
    compare_logits,
    largest_share,
    unit_of_evidence,
)
from runtime.manifest import PRECISIONS, CalibrationSpec, ParitySpec

CALIBRATION = CalibrationSpec(2.0, 0.0, -1.0, 1.0, 0.01, 0.05)
LOGITS = np.array([-3, -2, -1, 0, 1, 2, 3, 4], np.float32)
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def compare(logits, precision="fp16", calibration=CALIBRATION):
    return compare_logits(
        np.asarray(logits, np.float32),
        LOGITS,
        LABELS,
        calibration=calibration,
        reference_calibration=CALIBRATION,
        backend="onnxruntime",
        limits=LIMITS[precision],
    )


def test_equal_logits_pass_at_every_precision():
    for precision in PRECISIONS:
        parity = compare(LOGITS, precision)
        assert parity.passed
        assert (parity.logit_diff_max, parity.ap_change_points, parity.verdict_flips) == (0.0, 0.0, 0)


def test_figures_are_those_counted_by_hand():
    moved = LOGITS.copy()
    moved[3] = 3.5  # a real picture jumps to third place
    parity = compare(moved)
    assert parity.logit_diff_max == 3.5
    assert parity.logit_diff_mean == pytest.approx(3.5 / 8)
    assert (parity.verdict_flips, parity.opposite_verdicts) == (1, 0)  # uncertain to fake
    assert parity.accuracy_change_points == pytest.approx(-12.5)
    # Precision at the four fakes is now 1, 2/3, 3/4 and 4/5.
    assert parity.ap_change_points == pytest.approx(100 * ((1 + 2 / 3 + 3 / 4 + 4 / 5) / 4 - 1))
    assert not parity.passed


def test_real_called_fake_counts_as_opposite():
    swapped = LOGITS.copy()
    swapped[[0, 7]] = swapped[[7, 0]]
    parity = compare(swapped)
    assert (parity.verdict_flips, parity.opposite_verdicts) == (2, 2)


def test_each_precision_is_judged_at_its_own_threshold():
    shifted = replace(CALIBRATION, real_threshold=-0.8, fake_threshold=1.2)
    assert compare(LOGITS + 0.1, calibration=shifted).verdict_flips == 0
    assert compare(LOGITS + 0.1).verdict_flips == 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("logit_diff_max", 1.1, "largest logit difference"),
        ("logit_diff_mean", 0.11, "mean logit difference"),
        ("ap_change_points", -0.21, "AP loss"),
        ("accuracy_change_points", -1.41, "accuracy loss"),
        ("verdict_flips", 22, "verdicts flipped"),
        ("opposite_verdicts", 14, "opposite verdicts"),
        ("logit_diff_max", float("nan"), "largest logit difference nan"),
    ],
)
def test_each_limit_can_be_broken(field, value, words):
    sound = ParitySpec("onnxruntime", "torch fp32", 1000, 0.9, 0.09, -0.1, -0.4, 20, 1, True)
    assert broken_limits(sound, LIMITS["fp16"], calibration=CALIBRATION, logit_std=1.0) == []
    (broken,) = broken_limits(replace(sound, **{field: value}), LIMITS["fp16"], calibration=CALIBRATION, logit_std=1.0)
    assert words in broken


def test_separable_classes_are_not_judged_by_a_temperature_that_goes_to_zero():
    assert unit_of_evidence(CALIBRATION, logit_std=4.0) == 2.0
    sharp = replace(CALIBRATION, temperature=0.01)
    assert unit_of_evidence(sharp, logit_std=4.0) == 1.0
    moved = ParitySpec("onnxruntime", "torch fp32", 1000, 0.4, 0.04, 0.0, 0.0, 0, 0, True)
    assert broken_limits(moved, LIMITS["fp16"], calibration=sharp, logit_std=4.0) == []
    assert len(broken_limits(moved, LIMITS["fp16"], calibration=sharp, logit_std=0.4)) == 2


def test_a_better_ap_and_accuracy_break_nothing():
    better = ParitySpec("onnxruntime", "torch fp32", 1000, 0.0, 0.0, 5.0, 5.0, 0, 0, True)
    assert broken_limits(better, LIMITS["fp32"], calibration=replace(CALIBRATION, temperature=1.0), logit_std=1.0) == []


def test_without_room_for_uncertain_opposite_verdicts_are_limited_as_flips():
    flips = ParitySpec("onnxruntime", "torch fp32", 100, 0.0, 0.0, 0.0, 0.0, 8, 8, True)
    touching = replace(CALIBRATION, real_threshold=1.0)
    assert broken_limits(flips, LIMITS["int8"], calibration=touching, logit_std=1.0) == []
    (broken,) = broken_limits(flips, LIMITS["int8"], calibration=CALIBRATION, logit_std=1.0)
    assert "opposite verdicts" in broken


def test_a_share_is_exceeded_by_chance_once_in_a_thousand_verifications():
    drawn = np.random.default_rng(0).binomial(240, 0.03, size=200_000) / 240
    allowed = largest_share(0.03, pictures=240)
    assert np.mean(drawn > allowed) <= 1e-3 < np.mean(drawn > allowed - 1 / 240)
    assert largest_share(0.03, pictures=10**6) == pytest.approx(0.03, rel=0.03)
    assert largest_share(0.0, pictures=10**6) == 1e-6


def test_one_picture_is_always_allowed_and_two_are_not():
    one = ParitySpec("onnxruntime", "torch fp32", 40, 0.0, 0.0, 0.0, -2.5, 1, 1, True)
    assert broken_limits(one, LIMITS["fp32"], calibration=replace(CALIBRATION, temperature=1.0), logit_std=1.0) == []
    two = replace(one, verdict_flips=2, opposite_verdicts=0)
    assert broken_limits(two, LIMITS["fp32"], calibration=replace(CALIBRATION, temperature=1.0), logit_std=1.0) != []


def test_one_class_has_no_ap_and_is_compared_by_the_rest():
    parity = compare_logits(
        LOGITS,
        LOGITS,
        np.zeros(8, np.int64),
        calibration=CALIBRATION,
        reference_calibration=CALIBRATION,
        backend="onnxruntime",
        limits=LIMITS["fp32"],
    )
    assert parity.ap_change_points is None
    assert parity.passed


def test_centred_thresholds_keep_every_verdict_and_survive_the_last_bit():
    on_a_picture = replace(CALIBRATION, real_threshold=-1.0, fake_threshold=1.0)
    centred = centred_thresholds(on_a_picture, LOGITS)
    assert centred.verdicts(LOGITS).tolist() == on_a_picture.verdicts(LOGITS).tolist()
    assert (centred.real_threshold, centred.fake_threshold) == (-0.5, 1.5)
    nudged = np.nextafter(LOGITS, np.float32(np.inf))
    assert centred.verdicts(nudged).tolist() == centred.verdicts(LOGITS).tolist()
    assert on_a_picture.verdicts(nudged).tolist() != on_a_picture.verdicts(LOGITS).tolist()


def test_equal_thresholds_stay_equal_and_ends_stay_where_they_are():
    equal = replace(CALIBRATION, real_threshold=1.0, fake_threshold=1.0)
    centred = centred_thresholds(equal, LOGITS)
    assert centred.real_threshold == centred.fake_threshold == 1.5
    outside = replace(CALIBRATION, real_threshold=-9.0, fake_threshold=9.0)
    assert centred_thresholds(outside, LOGITS) == outside
