"""The verification command: passes for a sound bundle, fails where a gate is broken, and says where."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from bundle_fixtures import CALIBRATION
from exported import finished_run, full_bundle, pictures
from onnx import numpy_helper

from export.bundle_checks import compare_scores
from export.graph import initializers, model_bytes, store
from export.verification import Scores
from export.verify import main
from runtime.backends.ort import OrtBackend
from runtime.bundle import open_bundle
from runtime.manifest import PRECISIONS, save_manifest

BATCH = 6


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(full_bundle(), tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("export.bundle_checks.BATCH", BATCH)
    monkeypatch.setattr("export.bundle_checks.BATCHES", (1, 2))


@pytest.fixture
def onnxruntime_alone(monkeypatch):
    """Half the work, where one back-end shows it."""
    monkeypatch.setattr("export.bundle_checks.running_backends", lambda: ["onnxruntime"])


def verify(folder, tmp_path, *arguments):
    return main(["--model", str(folder), "--run", str(finished_run()), "--out", str(tmp_path / "out"), *arguments])


def change_graph(folder, precision, change):
    """Write a changed graph into a bundle whose manifest knows its new hash: only verification can tell."""
    manifest = open_bundle(folder).manifest
    path = folder / f"model.{precision}.onnx"
    model = onnx.load(path)
    change(model)
    content = model_bytes(model)
    path.write_bytes(content)
    changed = [
        replace(a, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)) if a.file == path.name else a
        for a in manifest.artifacts
    ]
    save_manifest(replace(manifest, artifacts=tuple(changed)), folder)


def first_scale(model):
    return next(n for n in initializers(model) if n.startswith("encoder.") and n.endswith(".weight.scale"))


def scale_by(factor):
    def change(model):
        name = first_scale(model)
        values = numpy_helper.to_array(initializers(model)[name]).copy()
        values[: len(values) // 2] *= np.float32(factor)
        store(model, name, values)

    return change


def test_a_sound_bundle_passes_every_check_and_leaves_json_markdown_and_pictures(tmp_path, capsys):
    assert verify(full_bundle(), tmp_path, "--latency", "--latency-seconds", "0.05") == 0
    out = capsys.readouterr().out
    assert "passed; report: " in out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert (found["passed"], found["failures"]) == (True, {})
    everywhere = [(c["precision"], c["backend"]) for c in found["comparisons"] if c["remainder"] == "fp32"]
    for_engines = found["comparisons"][-1]
    assert (for_engines["precision"], for_engines["remainder"]) == ("int8", "fp16")
    assert len(found["comparisons"]) == len(everywhere) + 1
    assert set(everywhere) >= {(precision, "onnxruntime") for precision in PRECISIONS}
    assert all(c["passed"] and c["pictures"] == 40 and not c["broken"] for c in found["comparisons"])
    for checks in (found["golden"], found["batch_invariance"]["checks"]):
        assert [(c["precision"], c["backend"]) for c in checks] == everywhere
        assert all(c["passed"] for c in checks)
    latency = found["latency"]
    cells = {
        (x["precision"], x["backend"], x["stage"], x["batch"]) for x in (*latency["measured"], *latency["left_out"])
    }
    assert cells == {(*where, stage, b) for where in everywhere for stage in latency["stages"] for b in (1, 2)}
    assert set(found["logits"]) == {
        "labels",
        "torch fp32",
        *(f"{p} on {b}" for p, b in everywhere),
        f"int8+fp16 on {for_engines['backend']}",
    }
    assert {len(values) for values in found["logits"].values()} == {40}
    assert found["environment"]["versions"]["onnxruntime"]
    assert found["environment"]["machine"]["cores"] >= 1


def test_one_damaged_scale_of_int8_fails_and_its_layer_is_named(bundle, tmp_path, onnxruntime_alone, capsys):
    change_graph(bundle, "int8", scale_by(8.0))
    assert verify(bundle, tmp_path, "--layers", "fp16", "int8") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "int8 on onnxruntime is outside its limits" in out
    assert "fp32 on onnxruntime is outside" not in out
    node = first_scale(onnx.load(bundle / "model.int8.onnx")).removesuffix(".weight.scale")
    assert f"of node {node} (Conv) is the first with too much noise" in out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    passed = {(c["precision"], c["remainder"]): c["passed"] for c in found["comparisons"]}
    whole = {("fp32", "fp32"), ("fp16", "fp32"), ("int8", "fp16")}
    assert passed == dict.fromkeys(whole, True) | {("int8", "fp32"): False}
    layers = [(c["precision"], c["bound_db"], c["culprit"] and c["culprit"]["node"]) for c in found["layers"]]
    assert layers == [("fp16", 30, None), ("int8", 10, node)]
    assert {c["pictures"] for c in found["layers"]} == {16}
    text = (tmp_path / "out" / "verify.md").read_text()
    assert "FAIL int8 on" in text
    assert "FAIL layers of int8" in text
    assert str(tmp_path) not in text


def test_a_damaged_graph_for_engines_fails_alone(bundle, tmp_path, onnxruntime_alone, capsys):
    change_graph(bundle, "int8-fp16", scale_by(8.0))
    assert verify(bundle, tmp_path) == 1
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert list(found["failures"]) == ["int8+fp16 on onnxruntime without optimizations"]
    assert "int8+fp16 on onnxruntime without optimizations is outside its limits" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_small_change_of_an_fp32_weight_fails(bundle, tmp_path, onnxruntime_alone, capsys):
    def nudge(model):
        weight = numpy_helper.to_array(initializers(model)["classifier.bias"])
        store(model, "classifier.bias", weight + np.float32(0.05))

    change_graph(bundle, "fp32", nudge)
    assert verify(bundle, tmp_path) == 1
    assert "--layers fp16 int8 compares the graphs" in capsys.readouterr().out


class Poisoned(OrtBackend):
    """Gives no number for the first picture of a batch of pictures."""

    def infer(self, images):
        outputs = super().infer(images)
        outputs.logits[0] = np.nan if len(images) % 2 else np.inf
        return outputs


def test_logits_that_are_not_finite_are_a_broken_gate_with_a_report(tmp_path, onnxruntime_alone, monkeypatch, capsys):
    folder = full_bundle()
    monkeypatch.setattr("runtime.backends.ort.OrtBackend", Poisoned)
    assert verify(folder, tmp_path) == 1
    assert "int8 on onnxruntime is outside its limits: 3 of 40 logits are not finite" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert found["failures"]["fp32 on onnxruntime"] == ["3 of 40 logits are not finite"]
    assert found["logits"]["fp32 on onnxruntime"][0] is None
    assert "3 of 40 logits are not finite" in (tmp_path / "out" / "verify.md").read_text()


@pytest.mark.parametrize("wrong", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr("export.verify.verify_bundle", None)
    if wrong == "a file":
        (tmp_path / "out").write_text("mine")
    else:
        monkeypatch.setattr("os.access", lambda path, mode: False)
    assert verify(full_bundle(), tmp_path) == 2
    assert f"error: --out {tmp_path / 'out'}: got " in capsys.readouterr().err


def test_a_comparison_passes_exactly_where_it_breaks_no_limit():
    # The band holds no picture, so centred both thresholds are one, and opposite verdicts count as flips.
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.normal(-3, 1, 100), rng.normal(3, 1, 100)]).astype(np.float32)
    labels = np.repeat([0, 1], 100)
    near = np.argsort(np.abs(reference))
    moved = np.concatenate([near[labels[near] == 0][:6], near[labels[near] == 1][:6]])
    labels[moved[::2]] = 1 - labels[moved[::2]]  # as many get right as get wrong
    logits = reference.copy()
    logits[moved] = -0.15 * np.sign(reference[moved])
    band = replace(CALIBRATION, real_threshold=-0.1, fake_threshold=0.1)
    scores = Scores(labels, reference, band, {("int8", "onnxruntime"): logits})
    bundle = SimpleNamespace(manifest=SimpleNamespace(calibration={"int8": band}))
    ((_, parity),), broken = compare_scores(scores, bundle)
    assert parity.opposite_verdicts == 12
    assert (parity.passed, broken["int8 on onnxruntime"]) == (True, [])


def test_a_back_end_whose_scores_change_with_the_batch_fails(tmp_path, onnxruntime_alone, monkeypatch, capsys):
    class Drifting(OrtBackend):
        """Scores right in the batches of the comparison and on the golden inputs."""

        def infer(self, images):
            outputs = super().infer(images)
            return outputs._replace(logits=outputs.logits + np.float32(len(images) == BATCH))

    monkeypatch.setattr("runtime.backends.ort.OrtBackend", Drifting)
    assert verify(full_bundle(), tmp_path) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "batch invariance of int8 on onnxruntime is outside its limits: the logit of" in out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert all(c["passed"] for c in (*found["comparisons"], *found["golden"]))
    assert not any(c["passed"] for c in found["batch_invariance"]["checks"])


def test_the_run_is_found_by_the_hash_of_its_weights_and_other_pictures_can_be_named(tmp_path, onnxruntime_alone):
    arguments = ["--model", str(full_bundle()), "--out", str(tmp_path / "out"), "--runs", str(finished_run().parent)]
    assert main([*arguments, "--data", str(pictures()), "--split", "train"]) in (0, 1)
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert {c["pictures"] for c in found["comparisons"]} == {4}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer-bound", "20"], "--layer-bound: got no --layers"),
        (["--latency", "--latency-seconds", "0"], "--latency-seconds: got 0, wanted more than 0"),
        (["--latency", "--latency-seconds", "inf"], "--latency-seconds: got inf, wanted more than 0"),
        (["--layers", "int8"], "--layers int8: got a bundle with these ONNX graphs: fp32"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(tiny_bundle, arguments, words, capsys):
    assert main(["--model", str(tiny_bundle), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_bound_that_is_no_number_is_refused(capsys):
    assert main(["--model", str(full_bundle()), "--layers", "int8", "--layer-bound", "nan"]) == 2
    assert "--layer-bound: got nan, wanted a number of dB" in capsys.readouterr().err


def test_without_a_matching_run_it_says_so(tmp_path, capsys):
    assert main(["--model", str(full_bundle()), "--runs", str(tmp_path)]) == 2
    assert "no run with the weights of this model" in capsys.readouterr().err


def test_a_run_with_other_weights_is_refused(bundle, tmp_path, capsys):
    manifest = open_bundle(bundle).manifest
    save_manifest(replace(manifest, checkpoint_sha256="b" * 64), bundle)
    assert verify(bundle, tmp_path) == 2
    assert "was exported from" in capsys.readouterr().err


def test_a_bundle_with_a_changed_byte_is_refused_before_anything_runs(bundle, tmp_path, capsys):
    path = bundle / "model.fp16.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify(bundle, tmp_path) == 2
    assert "model.fp16.onnx: got SHA-256" in capsys.readouterr().err


def test_no_backend_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("export.bundle_checks.running_backends", list)
    assert verify(full_bundle(), tmp_path) == 2
    assert "no back-end that runs here" in capsys.readouterr().err
