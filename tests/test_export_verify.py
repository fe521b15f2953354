"""The verification command: passes for a sound bundle, fails where a gate is broken, and says where."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from exported import finished_run, full_bundle, pictures
from onnx import numpy_helper

from export.graph import initializers, model_bytes, store
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
    everywhere = [(c["precision"], c["backend"]) for c in found["comparisons"]]
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
    assert set(found["logits"]) == {"labels", "torch fp32", *(f"{p} on {b}" for p, b in everywhere)}
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
    passed = {c["precision"]: c["passed"] for c in found["comparisons"]}
    assert passed == {"fp32": True, "fp16": True, "int8": False}
    layers = [(c["precision"], c["bound_db"], c["culprit"] and c["culprit"]["node"]) for c in found["layers"]]
    assert layers == [("fp16", 30, None), ("int8", 10, node)]
    assert {c["pictures"] for c in found["layers"]} == {16}
    text = (tmp_path / "out" / "verify.md").read_text()
    assert "FAIL int8 on" in text
    assert "FAIL layers of int8" in text
    assert str(tmp_path) not in text


def test_a_small_change_of_an_fp32_weight_fails(bundle, tmp_path, onnxruntime_alone, capsys):
    def nudge(model):
        weight = numpy_helper.to_array(initializers(model)["classifier.bias"])
        store(model, "classifier.bias", weight + np.float32(0.05))

    change_graph(bundle, "fp32", nudge)
    assert verify(bundle, tmp_path) == 1
    assert "--layers fp16 int8 compares the graphs" in capsys.readouterr().out


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
