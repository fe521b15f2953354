"""What a graph costs on validation pictures, and the calibration that is fitted to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from exported import finished_run, full_bundle, graphs, pictures
from onnx import numpy_helper

import export.judge
from export.budget import Budget, Cost
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.graph import copy_of, initializers, model_bytes, store
from export.judge import ALL, CALIBRATED_ON, NODE_BY_NODE, Candidate, Judge
from export.parity import matched_thresholds
from export.trt_options import Options
from runtime.bundle import open_bundle
from runtime.golden import STORED_FROM
from runtime.manifest import CalibrationSpec
from runtime.preprocess import PreprocessSpec
from train.checkpoint import load_calibration, load_detector
from train.data import load_split
from train.metrics import fit_calibration
from train.scoring import score_pictures

BUDGET = Budget(ap=0.5, accuracy=1.0, flips=0.5, ece=2.0)


@pytest.fixture(scope="module")
def judge():
    validation = load_split(pictures(), "val")
    reference = score_pictures(load_detector(finished_run()), validation.records, progress=False).logits
    images = PreparedPictures(validation, PreprocessSpec(160, 160), "0" * 64)
    manifest = open_bundle(full_bundle()).manifest
    return Judge(images, reference, load_calibration(finished_run()), manifest, ["onnxruntime"], BUDGET)


def candidate(precision, model=None):
    return Candidate(precision, model_bytes(model or graphs("test_resnet")[precision]))


def with_logits(change):
    """The FP32 graph with its classifier's weight and bias changed."""
    model = copy_of(graphs("test_resnet")["fp32"])
    for name in ("classifier.weight", "classifier.bias"):
        store(model, name, (change * numpy_helper.to_array(initializers(model)[name])).astype(np.float32))
    return model


def test_fp32_costs_nothing(judge):
    (cost,) = judge.costs([candidate("fp32")])
    assert cost.pictures == 40
    assert cost.excess(BUDGET) == []
    assert (cost.flips, cost.accuracy) == (0.0, 0.0)
    assert set(cost.ap.values()) == {0.0}
    assert ALL in cost.ap
    assert cost.logit_rms < 1e-4


def test_a_scale_of_the_logits_is_fitted_away_since_each_precision_has_its_own_calibration(judge):
    (cost,) = judge.costs([candidate("fp32", with_logits(3.0))])
    assert cost.logit_rms > 1
    assert (cost.flips, cost.worst_ap) == (0.0, 0.0)
    assert cost.ece == pytest.approx(0.0, abs=0.1)


def test_logits_that_fall_with_the_label_are_over_every_budget(judge):
    (cost,) = judge.costs([candidate("fp32", with_logits(-1.0))])
    assert cost.ece == np.inf
    assert cost.worst_ap > 10
    assert cost.excess(Budget(1e3, 1e3, 1e3, 1e3))[0] == "calibration error inf points, at most 1000.00"


def test_judging_stops_at_the_first_backend_over_the_budget_and_starts_with_the_calibrated_one(judge):
    pytest.importorskip("openvino")
    several = Judge(
        judge.pictures, judge.reference, load_calibration(finished_run()), judge._manifest,
        ["openvino", "onnxruntime"], BUDGET,
    )  # fmt: skip
    assert [c.backend for c in several.costs([candidate("fp32")])] == ["onnxruntime", "openvino"]
    assert [c.backend for c in several.costs([candidate("fp32", with_logits(-1.0))])] == ["onnxruntime"]


def test_ap_is_judged_where_real_pictures_have_a_generator_of_their_own(judge, monkeypatch):
    monkeypatch.setattr(judge, "_generators", np.where(judge._labels == 0, "photographs", "a generator"))
    (cost,) = judge.costs([candidate("fp32", with_logits(-1.0))])
    assert (cost.ap["photographs"], cost.ap["a generator"]) == (None, None)
    assert cost.worst_ap > 10


def test_limits_that_calibration_fits_away_are_held_all_the_same(judge, monkeypatch):
    scored = judge.scores(candidate("fp32"), "onnxruntime")
    monkeypatch.setattr(judge, "scores", lambda *arguments: scored + np.float32(3 * np.std(scored)))
    (cost,) = judge.costs([candidate("int8", graphs("test_resnet")["fp32"])])
    assert (cost.flips, cost.worst_ap) == (0.0, 0.0)
    assert any("mean logit difference" in words for words in cost.excess(BUDGET))


def test_logits_that_are_not_finite_are_over_budget_and_never_shipped(judge, monkeypatch):
    broken = judge.reference.copy()
    broken[3] = np.nan
    monkeypatch.setattr(judge, "scores", lambda *arguments: broken)
    (cost,) = judge.costs([candidate("int8", graphs("test_resnet")["fp32"])])
    assert len(cost.excess(BUDGET)) == 4
    with pytest.raises(ExportError, match="1 of 40 logits that are not finite"):
        judge.parity([candidate("fp32")])


def test_a_graph_is_scored_once_on_a_backend(judge, monkeypatch):
    judge.scores(candidate("fp16"), "onnxruntime")
    monkeypatch.setattr(judge, "_on_backend", None)
    assert len(judge.scores(candidate("fp16"), "onnxruntime")) == 40


def test_a_graph_for_engines_is_run_node_by_node_where_only_onnxruntime_runs(judge):
    model = graphs("test_resnet")["int8+fp16"]
    twin = Candidate("int8", model_bytes(model), "fp16")
    assert [c.backend for c in judge.costs([candidate("fp32"), twin])][-1] == f"{NODE_BY_NODE} (fp16 remainder)"
    _, parity = judge.parity([candidate("int8"), twin])
    assert [p.backend for p in parity["int8", "fp16"]] == [NODE_BY_NODE]
    assert parity["int8", "fp16"][0].logit_diff_max < 2 * parity["int8", "fp32"][0].logit_diff_max + 0.1


def test_graphs_of_a_precision_share_the_calibration_of_the_first(judge):
    first, second = candidate("fp32"), replace(candidate("fp32", with_logits(3.0)), remainder="fp16")
    (alone,) = judge.costs([second])
    _, shared = judge.costs([first, second])
    assert alone.flips == 0.0 < shared.flips
    assert judge.parity([first, second])[0] == judge.parity([first])[0] != judge.parity([second])[0]


def test_one_fake_that_is_missed_costs_its_generator_and_one_picture_of_accuracy_and_verdicts(judge, monkeypatch):
    generators = np.where(np.arange(40) % 2 == 0, "a", "b")  # both have real and fake pictures
    monkeypatch.setattr(judge, "_generators", generators)
    scored = judge.reference.copy()
    missed = np.flatnonzero((judge._labels == 1) & (generators == "a") & (scored > np.quantile(scored, 0.9)))[0]
    scored[missed] = scored.min() - 1
    monkeypatch.setattr(judge, "scores", lambda *arguments: scored)
    (cost,) = judge.costs([candidate("fp32")])
    assert cost.ap["b"] == 0.0
    assert cost.ap["a"] == cost.worst_ap > cost.ap[ALL] > 0.0
    assert cost.accuracy == pytest.approx(2.5)
    assert cost.flips == pytest.approx(2.5)


def test_the_thresholds_of_a_precision_are_moved_towards_the_verdicts_of_pytorch(judge):
    logits = judge.scores(candidate("fp32"), "onnxruntime")
    run = load_calibration(finished_run())
    rates = {"real_flagged_rate": run.real_flagged_rate, "fake_missed_rate": run.fake_missed_rate}
    fitted = fit_calibration(logits, judge._labels, **rates)
    wanted = judge._centred.verdicts(judge.reference)
    calibration, _ = judge.parity([candidate("fp32")])
    assert calibration["fp32"] == matched_thresholds(fitted, logits, wanted) != fitted


def test_a_graph_for_engines_is_run_without_the_optimiser_that_would_drop_its_integers(judge, monkeypatch):
    opened, open_session = [], export.judge.open_session
    monkeypatch.setattr(
        export.judge, "open_session", lambda model, **options: opened.append(options) or open_session(model, **options)
    )
    judge.scores(candidate("fp32", with_logits(0.5)), NODE_BY_NODE)
    assert opened == [{"optimize": False}]


def test_without_a_backend_nothing_can_be_judged(judge):
    with pytest.raises(ExportError, match="no back-end that runs here"):
        Judge(judge.pictures, judge.reference, load_calibration(finished_run()), judge._manifest, [], BUDGET)


def cost(**changes):
    found = {"ap": {"a": 0.1, "b": 0.6, "c": None, ALL: 0.2}, "accuracy": 0.0, "flips": 0.0, "ece": 0.0}
    return Cost(backend="x", pictures=1000, logit_rms=0.1, **(found | changes))


def test_the_generator_that_loses_most_counts_and_one_without_both_classes_does_not():
    assert cost().worst_ap == 0.6
    assert cost().excess(BUDGET) == ["AP 0.60 points, at most 0.50"]
    assert cost(ap={"c": None, ALL: 0.7}).worst_ap == 0.7
    assert cost(broken_limits=("mean logit difference 2",), ap={ALL: 0.0}).excess(BUDGET) == ["mean logit difference 2"]


def test_one_picture_is_always_allowed_and_nan_never_is():
    fits = cost(ap={ALL: 0.0}, flips=0.5)
    assert fits.excess(BUDGET) == []
    assert Cost("x", 100, {ALL: 0.0}, 1.0, 1.0, 0.0, 0.1).excess(BUDGET) == []
    assert Cost("x", 50, {ALL: 0.0}, 2.0, 2.0, 0.0, 0.1).excess(BUDGET) == []  # above both budgets, one picture each
    assert Cost("x", 100, {ALL: 0.0}, 1.0, 2.0, 0.0, 0.1).excess(BUDGET) == ["verdict flips 2.00 points, at most 1.00"]
    assert len(cost(ap={ALL: 0.0}, flips=float("nan")).excess(BUDGET)) == 1


def test_the_budget_is_that_of_the_command_line():
    assert Budget.of(Options(budget_flips=3.0)) == Budget(ap=0.5, accuracy=1.0, flips=3.0, ece=2.0)


@pytest.mark.parametrize("points", [-0.1, float("nan"), float("inf")])
def test_a_budget_that_is_no_number_of_points_is_refused(points):
    with pytest.raises(ExportError, match=r"--budget-ece: got .*wanted percentage points"):
        Budget.of(Options(budget_ece=points))


def test_thresholds_are_moved_towards_the_wanted_verdicts_but_never_to_a_laxer_place():
    logits = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    fitted = CalibrationSpec(1.0, 0.0, 1.5, 1.5, 0.1, 0.1)
    wanted = np.array(["real", "uncertain", "uncertain", "fake", "fake", "fake"])
    matched = matched_thresholds(fitted, logits, wanted)
    assert (matched.real_threshold, matched.fake_threshold) == (0.5, 2.5)
    laxer = np.array(["real", "real", "real", "real", "fake", "fake"])
    assert matched_thresholds(fitted, logits, laxer).real_threshold == 1.5
    earlier = np.array(["real", "fake", "fake", "fake", "fake", "fake"])
    assert matched_thresholds(fitted, logits, earlier).fake_threshold == 1.5


def test_golden_outputs_are_stored_from_the_back_end_that_a_precision_is_calibrated_on():
    assert CALIBRATED_ON == STORED_FROM
