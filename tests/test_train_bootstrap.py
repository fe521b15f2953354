"""Intervals by original picture: the weighted figures against scikit-learn, the resampling against plain facts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from runtime.manifest import CalibrationSpec
from train.bootstrap import METRICS, MIN_ORIGINALS, OriginalsBootstrap, interval, weighted_metrics
from train.metrics import detection_metrics

SPEC = CalibrationSpec(1.0, 0.0, -0.5, 0.5, 0.01, 0.05)


def noisy(count: int, *, ties: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    logits = rng.normal(labels, 1.0).astype(np.float32)
    return (np.round(logits, 1) if ties else logits), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [20, 127, 1000])
def test_weighted_figures_agree_with_scikit_learn(count: int, ties: bool) -> None:
    logits, labels = noisy(count, ties=ties)
    weights = np.random.default_rng(1).poisson(1.0, (5, count)).astype(float)
    ours = weighted_metrics(logits, labels, weights, SPEC)
    for d, w in enumerate(weights):
        assert ours["ap"][d] == pytest.approx(average_precision_score(labels, logits, sample_weight=w))
        assert ours["auc"][d] == pytest.approx(roc_auc_score(labels, logits, sample_weight=w))
        for name, cut in (("accuracy_at_half", 0.0), ("accuracy_at_threshold", 0.5)):
            assert ours[name][d] == pytest.approx(accuracy_score(labels, logits > cut, sample_weight=w))


@pytest.mark.parametrize("ties", [False, True])
def test_weights_of_one_give_the_plain_figures(ties: bool) -> None:
    logits, labels = noisy(257, ties=ties)
    ours = weighted_metrics(logits, labels, np.ones((1, 257)), SPEC)
    plain = detection_metrics(logits, labels, calibration=SPEC)
    for name in METRICS:
        assert ours[name][0] == pytest.approx(getattr(plain, name)), name


def test_draw_without_a_class_has_no_ranking() -> None:
    weights = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    ours = weighted_metrics(np.array([1.0, 0.0, -1.0]), np.array([1, 1, 0]), weights, SPEC)
    assert np.isnan(ours["ap"]).tolist() == [True, False]
    assert np.isnan(ours["real_flagged_rate"]).tolist() == [True, False]
    assert ours["fake_missed_rate"].tolist() == [0.5, 0.0]


def test_crops_of_one_original_widen_the_interval() -> None:
    logits, labels = noisy(60)
    alone, repeated = (np.tile(a, 16) for a in (logits, labels))
    rows = np.arange(len(alone))
    widths = {}
    for kind, originals in (("pictures", [str(i) for i in rows]), ("originals", [str(i % 60) for i in rows])):
        drawn = OriginalsBootstrap(originals, draws=300).draws_of(alone, repeated, rows, SPEC)
        assert drawn is not None
        found = interval(drawn["auc"])
        assert found is not None
        widths[kind] = found.high - found.low
    assert widths["originals"] > 3.0 * widths["pictures"]


def test_interval_covers_the_figure_and_repeats_itself() -> None:
    logits, labels = noisy(400)
    rows = np.arange(400)
    first, second = (
        OriginalsBootstrap([str(i) for i in rows], draws=200, seed=3).draws_of(logits, labels, rows, SPEC)
        for _ in range(2)
    )
    assert first is not None
    assert second is not None
    assert np.array_equal(first["ap"], second["ap"])
    found = interval(first["ap"])
    assert found is not None
    assert found.low < average_precision_score(labels, logits) < found.high


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = noisy(50)
    rows, originals = np.arange(50), [str(i) for i in range(50)]
    whole = OriginalsBootstrap(originals, draws=37).draws_of(logits, labels, rows, SPEC)
    monkeypatch.setattr("train.bootstrap._CHUNK_CELLS", 500)
    parts = OriginalsBootstrap(originals, draws=37).draws_of(logits, labels, rows, SPEC)
    assert whole is not None
    assert parts is not None
    assert all(np.array_equal(whole[name], parts[name]) and len(whole[name]) == 37 for name in METRICS)


def test_too_few_originals_give_no_interval() -> None:
    logits, labels = noisy(40)
    originals = [str(i % (MIN_ORIGINALS - 1)) for i in range(40)]
    assert OriginalsBootstrap(originals).draws_of(logits, labels, np.arange(40), SPEC) is None


def test_mostly_undefined_draws_give_no_interval() -> None:
    assert interval(np.array([np.nan] * 2 + [0.5] * 18)) is None
    assert interval(np.array([np.nan] + [0.5] * 19)) is not None
