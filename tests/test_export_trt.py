"""The export command on a tiny run: the bundle it leaves, what it keeps, and how it fails."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from exported import EXPORT_OPTIONS, finished_run, fp32_graph, full_bundle, pictures

import export.judge
import export.run_export
from export.budget import Cost
from export.bundling import golden_images
from export.engine_artifacts import engine_source
from export.errors import ExportError
from export.graph import copy_of, model_bytes
from export.int8_kept import KEPT_FILE
from export.trt import main
from export.trt_options import Options, asked_precisions
from runtime import Detector
from runtime.bundle import open_bundle
from runtime.describe import describe_manifest
from runtime.manifest import OUTPUTS, PRECISIONS, ProfileSpec
from train.checkpoint import load_calibration


@pytest.fixture
def quick(monkeypatch):
    """The FP32 graph of the run without tracing it again; `full_bundle` covers that."""
    model = onnx.load(full_bundle() / "model.fp32.onnx")
    monkeypatch.setattr(export.run_export, "onnx_from_model", lambda detector: copy_of(model))


@pytest.fixture
def bundle(tmp_path):
    """A copy of the full bundle that a test may write into."""
    return shutil.copytree(full_bundle(), tmp_path / "tiny")


def artifacts(folder):
    return {a.file: a for a in open_bundle(folder).manifest.artifacts}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_main(folder, *arguments):
    return main(["--run", str(finished_run()), "--model", str(folder), *EXPORT_OPTIONS, *arguments])


def test_no_precision_flag_means_all_three():
    assert asked_precisions(Options()) == list(PRECISIONS)
    assert asked_precisions(Options(int8=True)) == ["int8"]
    assert asked_precisions(Options(int8=True, fp32=True)) == ["fp32", "int8"]


def test_the_bundle_holds_a_graph_and_an_engine_of_each_precision():
    pytest.importorskip("tensorrt_rtx")
    found = artifacts(full_bundle())
    assert {f"model.{p}.onnx" for p in PRECISIONS} <= found.keys()
    engines = [a for a in found.values() if a.format == "engine"]
    assert sorted(a.precision for a in engines) == sorted(PRECISIONS)
    for engine in engines:
        assert engine.flavour == "rtx"
        assert engine.file == f"model.{engine.precision}.rtx-portable.engine"
        assert engine.profile == ProfileSpec(1, 2, 4)
        assert len(engine.targets) > 1
        onnx = found["model.int8-fp16.onnx" if engine.precision == "int8" else f"model.{engine.precision}.onnx"]
        assert (engine.engine.source, engine.engine.source_sha256) == (onnx.file, onnx.sha256)


def test_every_graph_passed_its_comparison_on_every_backend_and_names_its_wider_layers():
    for artifact in artifacts(full_bundle()).values():
        if artifact.format != "onnx":
            continue
        assert {"onnxruntime", "openvino"} >= {p.backend for p in artifact.parity}
        assert artifact.parity
        assert all(p.passed and p.pictures == 40 and p.reference == "torch fp32" for p in artifact.parity)
        assert bool(artifact.higher_precision_layers) == (artifact.precision != "fp32")


def test_each_precision_has_its_own_calibration_for_the_rates_of_the_run():
    calibration = open_bundle(full_bundle()).manifest.calibration
    run = load_calibration(finished_run())
    assert set(calibration) == set(PRECISIONS)
    assert calibration["int8"] != calibration["fp32"]
    assert calibration["fp32"].temperature == pytest.approx(run.temperature, rel=1e-3)
    assert {c.real_flagged_rate for c in calibration.values()} == {run.real_flagged_rate}


def test_golden_outputs_are_what_the_runtime_gives_and_show_nobodys_picture():
    bundle = open_bundle(full_bundle())
    golden = np.load(io.BytesIO(bundle.read(bundle.manifest.golden)))
    np.testing.assert_array_equal(golden["images"], golden_images(160, 160))
    assert golden["images"].shape == (4, 160, 160, 3)
    for precision in PRECISIONS:
        with Detector.load(full_bundle(), backend="onnxruntime", precision=precision) as detector:
            found = list(detector.predict(list(golden["images"]), batch_size=4))
        logits = golden[f"{precision}.logits"]
        expected = bundle.manifest.calibration[precision].fake_probability(logits)
        np.testing.assert_allclose([d.fake_probability for d in found], expected, atol=1e-6)
        assert {f"{precision}.{name}" for name in OUTPUTS} <= set(golden.files)


def test_two_exports_of_the_same_weights_give_the_same_graph():
    assert (full_bundle() / "model.fp32.onnx").read_bytes() == model_bytes(fp32_graph("test_resnet"))


def test_int8_alone_gives_the_bytes_of_an_export_of_all_and_a_refused_engine_costs_no_second_search(
    tmp_path, quick, capsys, monkeypatch
):
    full_bundle()
    kept, folder = finished_run() / KEPT_FILE, tmp_path / "tiny"
    kept.unlink()  # what the export of all found

    def refuse(*arguments, **settings):
        raise ExportError("int8 engine", got="no tactic", wanted="an engine", remedy="allow more memory")

    monkeypatch.setattr("export.run_export.installed_tensorrt", lambda *arguments: "one that refuses")
    monkeypatch.setattr("export.run_export.build_engines", refuse)
    assert run_main(folder, "--int8") == 1
    captured = capsys.readouterr()
    assert "quantising to INT8" in captured.out
    assert f"allow more memory. The INT8 graph that was found is kept in {kept}: the same export" in captured.err
    assert not folder.exists()

    monkeypatch.setattr("export.graphs.int8_within_budget", None)
    report = finished_run() / "report" / "int8" / "int8.json"
    searched = report.read_text()
    assert run_main(folder, "--int8", "--no-engine") == 0
    assert f"INT8 as an earlier export of the same found it: {kept}" in capsys.readouterr().out
    assert report.read_text() == searched
    assert sorted(artifacts(folder)) == ["model.fp32.onnx", "model.int8-fp16.onnx", "model.int8.onnx"]
    for name in ("model.int8.onnx", "model.int8-fp16.onnx", "calibration.json"):
        assert (folder / name).read_bytes() == (full_bundle() / name).read_bytes()


def test_asking_for_one_precision_keeps_the_others_and_the_engine_that_would_be_built_again(bundle, quick, capsys):
    before = files(bundle)
    assert run_main(bundle, "--fp16") == 0
    after = files(bundle)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name != "manifest.json")
    assert {a.precision for a in artifacts(bundle).values()} == set(PRECISIONS)
    built = any(name.endswith(".engine") for name in before)
    assert ("fp16 engine is already built: model.fp16.rtx-portable.engine" in capsys.readouterr().out) == built


def test_a_target_that_cannot_be_built_for_is_refused_before_the_graphs_are_made(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert run_main(tmp_path / "tiny", "--fp32", "--target", "sm100") == 1
    assert "use tensorrt on a GPU of sm100" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_bundle_of_another_checkpoint_is_replaced_as_a_whole(bundle, quick, monkeypatch):
    monkeypatch.setattr("export.run_inputs.sha256_of", lambda path: "a" * 64)
    assert run_main(bundle, "--fp32", "--no-engine") == 0
    assert sorted(artifacts(bundle)) == ["model.fp32.onnx"]


def test_without_tensorrt_the_bundle_is_made_and_the_message_says_what_to_install(tmp_path, quick, monkeypatch, capsys):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_main(tmp_path / "tiny", "--fp32") == 0
    assert sorted(artifacts(tmp_path / "tiny")) == ["model.fp32.onnx"]
    text = capsys.readouterr().out
    assert "TensorRT is not installed" in text
    assert 'pip install "ntf-toolkit[rtx]"' in text


def test_a_failed_export_leaves_the_old_bundle_whole_and_nothing_beside_it(bundle, quick, monkeypatch, capsys):
    before = files(bundle)

    def fail(*arguments, **settings):
        from export.errors import ExportError

        raise ExportError("engine", got="nothing", wanted="an engine", remedy="try again")

    monkeypatch.setattr("export.run_export.golden_content", fail)
    assert run_main(bundle, "--fp32", "--no-engine") == 1
    assert "error: engine: got nothing" in capsys.readouterr().err
    assert files(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


def test_a_folder_with_something_else_in_it_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run_main(tmp_path, "--fp32") == 1
    assert "holds something else than a model bundle" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_bundle_is_replaced_and_that_is_said(bundle, quick, capsys):
    (bundle / "model.int8.onnx").write_bytes(b"damaged")
    assert run_main(bundle, "--fp32", "--no-engine") == 0
    assert "is damaged and is replaced" in capsys.readouterr().out
    assert sorted(artifacts(bundle)) == ["model.fp32.onnx"]


def test_changed_validation_pictures_stop_the_export(tmp_path, capsys, monkeypatch):
    moved = shutil.copytree(pictures(), tmp_path / "pictures")
    next(moved.rglob("val/**/*.png")).unlink()
    monkeypatch.setattr("export.run_inputs.data_source", lambda name: moved)
    assert run_main(tmp_path / "tiny", "--fp32") == 1
    assert "the pictures that" in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert main(["--run", str(tmp_path / "none"), "--model", str(tmp_path / "m")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_profile_that_makes_no_sense_is_an_error(tmp_path, capsys):
    assert run_main(tmp_path / "tiny", "--min-batch", "8", "--max-batch", "4") == 1
    assert "min_batch <= opt_batch <= max_batch" in capsys.readouterr().err


def test_the_list_of_calibration_pictures_travels_with_int8_and_stays_when_another_precision_is_made(bundle, quick):
    manifest = open_bundle(full_bundle()).manifest
    assert manifest.calibration_list.pictures == 24
    listed = json.loads((full_bundle() / "calibration.json").read_text())
    assert len(listed["pictures"]) == 24
    assert run_main(bundle, "--fp16", "--no-engine") == 0
    assert open_bundle(bundle).manifest.calibration_list == manifest.calibration_list


def test_both_int8_graphs_have_the_same_integers_and_the_engine_comes_from_the_half_one():
    pytest.importorskip("tensorrt_rtx")
    found = artifacts(full_bundle())
    one, other = found["model.int8.onnx"], found["model.int8-fp16.onnx"]
    assert (one.remainder, other.remainder) == ("fp32", "fp16")
    assert one.higher_precision_layers.items() <= other.higher_precision_layers.items()
    shown = describe_manifest(open_bundle(full_bundle()).manifest)
    assert "int8, onnx, opset 20, for engines: fp16 between the integer layers, " in shown
    assert "INT8 ranges from calibration.json, 24 pictures" in shown
    assert other.parity
    assert open_bundle(full_bundle()).manifest.onnx_artifact("int8") == one
    weights = [
        {t.name: t.raw_data for t in onnx.load(full_bundle() / name).graph.initializer if t.name.endswith(".int8")}
        for name in (one.file, other.file)
    ]
    assert weights[0] == weights[1] != {}


def test_how_int8_was_found_is_in_the_report_of_the_run():
    full_bundle()
    report = json.loads((finished_run() / "report" / "int8" / "int8.json").read_text())
    assert report["budget"]["flips"] == Options().budget_flips
    assert report["steps"][-1]["excess"] == []
    assert report["calibrator"] in report["calibrators"]
    assert report["environment"]["machine"]
    assert "INT8 within the accuracy budget" in (finished_run() / "report" / "int8" / "int8.md").read_text()


def test_over_budget_nothing_is_shipped_and_the_old_bundle_stands(bundle, quick, capsys, monkeypatch):
    before = files(bundle)
    monkeypatch.setattr(Cost, "excess", lambda self, budget: ["AP 9.00 points, at most 0.50"])
    assert run_main(bundle, "--int8", "--no-engine", "--calibrator", "minmax") == 1
    assert "still AP 9.00 points, at most 0.50 on onnxruntime" in capsys.readouterr().err
    assert files(bundle) == before


def test_a_graph_outside_its_limits_is_not_shipped(bundle, quick, capsys, monkeypatch):
    before = files(bundle)
    real = export.judge.compare_logits
    monkeypatch.setattr(export.judge, "compare_logits", lambda *a, **k: replace(real(*a, **k), passed=False))
    assert run_main(bundle, "--fp16", "--no-engine") == 1
    assert "parity with PyTorch" in capsys.readouterr().err
    assert files(bundle) == before


def test_a_foreign_graph_takes_the_place_of_int8_after_the_same_checks(bundle, quick, capsys):
    foreign = full_bundle() / "model.int8.onnx"
    assert run_main(bundle, "--int8", "--no-engine", "--qdq-onnx", str(foreign)) == 0
    manifest = open_bundle(bundle).manifest
    assert manifest.onnx_artifact("int8").builder.startswith("pytorch")
    assert manifest.onnx_artifact("int8", "fp16") is None
    assert manifest.calibration_list is None
    assert engine_source(manifest, "int8").file == "model.int8.onnx"


def test_a_foreign_graph_over_the_budget_is_refused(bundle, quick, capsys, monkeypatch):
    monkeypatch.setattr(Cost, "excess", lambda self, budget: ["verdict flips 9.00 points, at most 0.50"])
    foreign = full_bundle() / "model.int8.onnx"
    assert run_main(bundle, "--int8", "--no-engine", "--qdq-onnx", str(foreign)) == 1
    assert "verdict flips 9.00 points, at most 0.50 on onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibration-pictures", "0"), "--calibration-pictures: got 0, wanted at least 1"),
        (("--budget-ap", "nan"), "--budget-ap: got nan, wanted percentage points"),
        (("--fp16", "--qdq-onnx", "q.onnx"), "got an export of fp16, wanted an export of INT8"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_run_is_read(tmp_path, capsys, arguments, message):
    assert main(["--run", str(tmp_path / "none"), "--model", str(tmp_path / "m"), *arguments]) == 1
    assert message in capsys.readouterr().err
