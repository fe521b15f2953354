"""The verification command: passes for a sound bundle, fails for a damaged graph, and says where."""

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
from runtime.bundle import open_bundle
from runtime.manifest import save_manifest


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(full_bundle(), tmp_path / "tiny")


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


def scale_by(factor):
    def change(model):
        name = next(n for n in initializers(model) if n.startswith("encoder.") and n.endswith(".scale"))
        values = numpy_helper.to_array(initializers(model)[name]).copy()
        values[: len(values) // 2] *= np.float32(factor)
        store(model, name, values)

    return change


def test_a_sound_bundle_passes_and_leaves_json_and_markdown(tmp_path, capsys):
    assert verify(full_bundle(), tmp_path) == 0
    assert "passed" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert {(c["precision"], c["backend"]) for c in found["comparisons"]} >= {
        (precision, "onnxruntime") for precision in ("fp32", "fp16", "int8")
    }
    assert all(c["passed"] and c["pictures"] == 40 and not c["broken"] for c in found["comparisons"])
    assert found["environment"]["versions"]["onnxruntime"]
    assert found["environment"]["machine"]["cores"] >= 1
    text = (tmp_path / "out" / "verify.md").read_text()
    assert "| int8 | onnxruntime | " in text
    assert str(tmp_path) not in text


def test_one_damaged_scale_of_int8_fails_and_is_named(bundle, tmp_path, capsys):
    change_graph(bundle, "int8", scale_by(8.0))
    assert verify(bundle, tmp_path) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "int8 on onnxruntime is outside its limits" in out
    assert "fp32 on onnxruntime is outside" not in out
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    passed = {c["precision"]: c["passed"] for c in found["comparisons"]}
    assert passed == {"fp32": True, "fp16": True, "int8": False}
    assert "FAIL int8 on" in (tmp_path / "out" / "verify.md").read_text()


def test_a_small_change_of_an_fp32_weight_fails(bundle, tmp_path):
    def nudge(model):
        weight = numpy_helper.to_array(initializers(model)["classifier.bias"])
        store(model, "classifier.bias", weight + np.float32(0.05))

    change_graph(bundle, "fp32", nudge)
    assert verify(bundle, tmp_path) == 1


def test_the_run_is_found_by_the_hash_of_its_weights(tmp_path):
    arguments = ["--model", str(full_bundle()), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--runs", str(finished_run().parent)]) == 0
    assert (tmp_path / "out" / "verify.json").is_file()


def test_without_a_matching_run_it_says_so(tmp_path, capsys):
    assert main(["--model", str(full_bundle()), "--runs", str(tmp_path)]) == 1
    assert "no run with the weights of this model" in capsys.readouterr().err


def test_a_run_with_other_weights_is_refused(bundle, tmp_path, capsys):
    manifest = open_bundle(bundle).manifest
    save_manifest(replace(manifest, checkpoint_sha256="b" * 64), bundle)
    assert verify(bundle, tmp_path) == 1
    assert "was exported from" in capsys.readouterr().err


def test_other_pictures_can_be_named(tmp_path):
    assert verify(full_bundle(), tmp_path, "--data", str(pictures()), "--split", "train") in (0, 1)
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert {c["pictures"] for c in found["comparisons"]} == {4}


def test_a_bundle_with_a_changed_byte_is_refused_before_anything_runs(bundle, tmp_path, capsys):
    path = bundle / "model.fp16.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify(bundle, tmp_path) == 1
    assert "model.fp16.onnx: got SHA-256" in capsys.readouterr().err


def test_no_backend_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("export.verify.running_backends", list)
    assert verify(full_bundle(), tmp_path) == 1
    assert "no back-end that runs here" in capsys.readouterr().err
