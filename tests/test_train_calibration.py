"""How well probabilities and wanted rates hold: hand-computed cases, the table of thresholds, Markdown and figure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.manifest import CalibrationSpec
from runtime.strict_json import from_jsonable
from train.calibration import (
    UNCALIBRATED,
    CalibrationReport,
    check_rates,
    measure_calibration,
    probability_figures,
    reliability_bins,
    wilson_share,
)
from train.calibration_report import calibration_section, write_calibration_figure
from train.errors import ConfigError
from train.metrics import expected_calibration_error, real_flagged_threshold
from train.validation_scores import ValidationScores

SPEC = CalibrationSpec(2.0, 0.25, -1.0, 1.0, 0.1, 0.1)
LABELS = np.tile([0, 1], 40)
ROWS = {"near": np.arange(40), "far": np.arange(40, 80)}


def logits_of(*, shift: float) -> np.ndarray:
    """(80,): two classes two apart with a spread of 1, the second generator's shifted."""
    rng = np.random.default_rng(0)
    return rng.normal(2.0 * LABELS - 1.0, 1.0) + np.repeat([0.0, shift], 40)


@pytest.fixture(scope="module")
def validation() -> ValidationScores:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [50, 20])
    logits = rng.normal(2.0 * labels - 1.0, 1.0).astype(np.float32)
    return ValidationScores(tuple(map(str, range(70))), tuple(labels.tolist()), tuple(map(float, logits)))


@pytest.fixture(scope="module")
def report(validation: ValidationScores) -> CalibrationReport:
    return measure_calibration(
        logits_of(shift=2.0), LABELS, ROWS, SPEC, validation=validation, rates=(0.001, 0.02, 0.1)
    )


def test_figures_of_a_hand_computed_case() -> None:
    # Probabilities 1/2, 1/2, 3/4 and 1/4 of labels 0, 1, 1 and 0.
    figures = probability_figures(np.array([0.0, 0.0, math.log(3), -math.log(3)]), np.array([0, 1, 1, 0]), UNCALIBRATED)
    assert figures.brier == pytest.approx((1 / 4 + 1 / 4 + 1 / 16 + 1 / 16) / 4)
    assert figures.nll == pytest.approx((2 * math.log(2) + 2 * math.log(4 / 3)) / 4)
    assert figures.ece == pytest.approx((0 + 0.25 + 0.25) / 4)
    filled = {round(b.low * 15): (b.pictures, b.mean_probability, b.fake_share) for b in figures.bins if b.pictures}
    assert filled == {7: (2, 0.5, 0.5), 11: (1, pytest.approx(0.75), 1.0), 3: (1, pytest.approx(0.25), 0.0)}


def test_calibrated_figures_are_those_of_the_calibrated_logit() -> None:
    logits = logits_of(shift=0.0)
    assert probability_figures(logits, LABELS, SPEC) == probability_figures(logits / 2.0 + 0.25, LABELS, UNCALIBRATED)


def test_likelihood_of_an_extreme_logit_is_finite() -> None:
    figures = probability_figures(np.array([-1000.0, 1000.0]), np.array([1, 1]), UNCALIBRATED)
    assert figures.nll == 500.0


def test_bins_give_the_calibration_error_of_the_metrics() -> None:
    rng = np.random.default_rng(2)
    probability, labels = rng.random(500), rng.integers(0, 2, 500)
    probability[:2] = 0.0, 1.0
    bins = reliability_bins(probability, labels)
    gaps = [b.pictures * abs(b.mean_probability - b.fake_share) for b in bins if b.pictures]
    assert sum(gaps) / 500 == pytest.approx(expected_calibration_error(probability, labels))
    assert sum(b.pictures for b in bins) == 500


def test_wilson_interval_of_known_counts() -> None:
    none = wilson_share(np.zeros(10, dtype=bool))
    half = wilson_share(np.arange(10) < 5)
    assert none is not None
    assert half is not None
    assert (none.share, none.count, none.total, none.low) == (0.0, 0, 10, 0.0)
    assert none.high == pytest.approx(0.27753, abs=1e-4)
    assert (half.low, half.high) == (pytest.approx(0.23659, abs=1e-4), pytest.approx(0.76341, abs=1e-4))
    assert wilson_share(np.zeros(0, dtype=bool)) is None


def test_thresholds_are_fitted_on_validation_and_measured_on_the_scored_pictures(
    report: CalibrationReport, validation: ValidationScores
) -> None:
    assert report.thresholds is not None
    assert (report.thresholds.validation_real, report.thresholds.validation_fake) == (50, 20)
    row = report.thresholds.rows[2]
    assert row.threshold == real_flagged_threshold(*validation.arrays(), rate=0.1)
    logits = logits_of(shift=2.0)
    called = logits > row.threshold
    assert row.pooled is not None
    assert row.pooled.real_flagged == wilson_share(called[LABELS == 0])
    assert row.pooled.fake_missed == wilson_share(~called[LABELS == 1])
    near, far = row.generators["near"].real_flagged, row.generators["far"].real_flagged
    assert near is not None
    assert far is not None
    assert near.share < 0.3 < far.share  # shifted by two: what held on validation does not hold there


def test_rate_that_validation_cannot_resolve_says_how_many_pictures_it_needs(report: CalibrationReport) -> None:
    assert report.thresholds is not None
    first = report.thresholds.rows[0]
    assert (first.wanted, first.needed, first.threshold, first.pooled, first.generators) == (
        0.001,
        1000,
        None,
        None,
        {},
    )
    text = calibration_section(report, SPEC)
    assert "| 0.1 % | n/a: needs 1,000 real validation pictures | n/a | n/a | n/a | n/a |" in text


def test_table_is_fitted_by_the_rule_of_the_run(validation: ValidationScores) -> None:
    spec = replace(SPEC, threshold_rule="conformal")
    made = measure_calibration(logits_of(shift=0.0), LABELS, ROWS, spec, validation=validation, rates=(0.1, 0.01))
    assert made.thresholds is not None
    expected = real_flagged_threshold(*validation.arrays(), rate=0.1, rule="conformal")
    assert made.thresholds.rows[0].threshold == expected
    assert expected > real_flagged_threshold(*validation.arrays(), rate=0.1)
    assert made.thresholds.rows[1].needed == 99
    text = calibration_section(made, spec)
    assert "Rule of the thresholds: conformal: class-conditional split conformal" in text
    assert "are not exchangeable with the validation pictures, so no rule promises anything for them" in text


def test_coverage_counts_verdicts_that_are_not_the_wrong_one() -> None:
    logits, labels = np.array([-2.0, 0.0, 2.0, 2.0, 0.0, -2.0]), np.array([0, 0, 0, 1, 1, 1])
    made = measure_calibration(logits, labels, {"one": np.arange(6), "real": np.arange(3)}, SPEC, validation=None)
    assert made.pooled.real_covered is not None
    assert made.pooled.fake_covered is not None
    assert (made.pooled.real_covered.count, made.pooled.fake_covered.count) == (2, 2)
    assert made.generators["real"].fake_covered is None
    assert "| real | 66.7 [20.8, 93.9] | n/a |" in calibration_section(made, SPEC)


def test_run_without_validation_scores_says_so_and_how_to_get_them() -> None:
    made = measure_calibration(logits_of(shift=0.0), LABELS, ROWS, SPEC, validation=None)
    assert made.thresholds is None
    assert "n/a: the run has no validation_scores.json" in calibration_section(made, SPEC)


@pytest.mark.parametrize("rates", [(), (0.0,), (0.5, 1.0)])
def test_rates_outside_zero_and_one_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--real-flagged-rates: got .*, wanted shares between 0 and 1"):
        check_rates(rates)


@pytest.mark.parametrize("thresholds", [True, False])
def test_figure_is_a_picture_with_and_without_thresholds(
    report: CalibrationReport, tmp_path: Path, thresholds: bool
) -> None:
    write_calibration_figure(tmp_path / "f.png", report if thresholds else replace(report, thresholds=None))
    with Image.open(tmp_path / "f.png") as figure:
        assert (figure.size[0] > 1200) == thresholds
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 20


def test_report_comes_back_from_plain_types(report: CalibrationReport) -> None:
    plain = json_types(asdict(report))
    assert from_jsonable(CalibrationReport, plain) == report


def json_types(value: object) -> object:
    return json.loads(json.dumps(value, allow_nan=False))
