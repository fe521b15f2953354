from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, add_engine, parity, write_bundle

from runtime.errors import BundleError
from runtime.manifest import (
    ArtifactSpec,
    CalibrationSpec,
    ModelManifest,
    ProfileSpec,
    manifest_from_json,
    manifest_to_json,
    save_manifest,
    sha256_of,
)
from runtime.strict_json import ADDED_LATER, canonical_json, from_jsonable, to_jsonable


@pytest.fixture
def manifest(tmp_path):
    return write_bundle(
        tmp_path / "m", precisions=("fp32", "int8"), parities={"int8": [parity(), parity(passed=False)]}
    )


def _rehashed(plain):
    """Text of a changed manifest whose own hash is right again, so that only the schema can refuse it."""
    import hashlib

    plain.pop("manifest_sha256", None)
    digest = hashlib.sha256(canonical_json(plain).encode()).hexdigest()
    return canonical_json(plain | {"manifest_sha256": digest})


def test_manifest_survives_a_round_trip(manifest):
    assert manifest_from_json(manifest_to_json(manifest)) == manifest


def test_equal_manifests_give_equal_bytes(manifest, tmp_path):
    again = write_bundle(tmp_path / "again", precisions=("fp32", "int8"))
    again = replace(again, artifacts=manifest.artifacts)
    assert manifest_to_json(again) == manifest_to_json(manifest)
    assert manifest_to_json(manifest).endswith("}\n")


def test_engine_artifact_survives_a_round_trip(manifest):
    engine = ArtifactSpec(
        file="model.int8.rtx-sm89.engine",
        format="engine",
        precision="int8",
        sha256="a" * 64,
        size_bytes=10,
        opset=None,
        profile=ProfileSpec(1, 8, 64),
        flavour="rtx",
        targets=("sm89",),
        builder="tensorrt_rtx 1.7",
        versions={"onnx": "1.20"},
        higher_precision_layers={"/head/Gemm": "verdict flips"},
        parity=(),
    )
    full = replace(manifest, artifacts=(*manifest.artifacts, engine))
    assert manifest_from_json(manifest_to_json(full)).artifacts[-1] == engine


def test_numpy_numbers_are_written_as_plain_ones(manifest):
    numpy_made = replace(manifest, embedding_dim=np.int64(128), calibration_pictures=np.int32(16))
    assert manifest_to_json(numpy_made) == manifest_to_json(manifest)


@pytest.mark.parametrize("field", [f.name for f in fields(ModelManifest) if f.metadata != ADDED_LATER])
def test_missing_field_is_refused(manifest, field):
    plain = json.loads(manifest_to_json(manifest))
    del plain[field]
    with pytest.raises(BundleError, match=field):
        manifest_from_json(_rehashed(plain))


@pytest.mark.parametrize(
    "place",
    [(), ("preprocess",), ("calibration", "fp32"), ("artifacts", 0), ("artifacts", 1, "parity", 0), ("golden",)],
)
def test_unknown_field_is_refused_at_every_level(manifest, place):
    plain = json.loads(manifest_to_json(manifest))
    target = plain
    for step in place:
        target = target[step]
    target["surprise"] = 1
    with pytest.raises(BundleError, match="unknown field 'surprise'"):
        manifest_from_json(_rehashed(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": "128"}, "embedding_dim: got '128', wanted a value of type int"),
        ({"embedding_dim": True}, "embedding_dim: got True, wanted a value of type int"),
        ({"embedding_dim": 128.0}, "embedding_dim: got 128.0"),
        ({"name": None}, "manifest.name: got None"),
        ({"evidence_shape": [4]}, r"evidence_shape: got 1 values, wanted 2 values"),
        ({"artifacts": {}}, "artifacts: got {}, wanted a list"),
        ({"calibration": []}, r"calibration: got \[\], wanted an object"),
        ({"golden": 3}, "golden: got 3, wanted an object"),
        ({"labels": ["fake", "real"]}, "manifest.labels"),
        ({"outputs": ["logits"]}, "manifest.outputs"),
        ({"mean_trace": [1.0]}, "manifest.mean_trace: got 1 values"),
        ({"checkpoint_sha256": "xyz"}, "checkpoint_sha256: got 'xyz', wanted 64 hexadecimal digits"),
        ({"name": " "}, "manifest.name"),
    ],
)
def test_wrong_type_or_value_is_refused_with_its_place(manifest, change, message):
    plain = json.loads(manifest_to_json(manifest)) | change
    with pytest.raises(BundleError, match=message):
        manifest_from_json(_rehashed(plain))


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_unknown_schema_version_is_refused_before_its_fields_are_read(version):
    with pytest.raises(BundleError, match=r"manifest\.schema_version: got .*, wanted 1"):
        manifest_from_json(json.dumps({"schema_version": version, "whatever": "else"}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "NaN", '{"schema_version": NaN}', "[" * 100_000])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        manifest_from_json(text)


def test_changed_character_is_found_wherever_it_is(manifest):
    text = manifest_to_json(manifest)
    for index in range(0, len(text), 53):
        replacement = "1" if text[index] != "1" else "2"
        with pytest.raises(BundleError):
            manifest_from_json(text[:index] + replacement + text[index + 1 :])


@pytest.mark.parametrize("edit", [lambda t: t + "\n", lambda t: t.replace("\n", "\r\n"), lambda t: " " + t])
def test_same_content_in_other_bytes_is_refused(manifest, edit):
    with pytest.raises(BundleError, match="manifest_sha256"):
        manifest_from_json(edit(manifest_to_json(manifest)))


def test_duplicate_key_is_refused(manifest):
    text = manifest_to_json(manifest).replace('"name":', '"name": "other",\n "name":', 1)
    with pytest.raises(BundleError, match="manifest_sha256"):
        manifest_from_json(text)


@pytest.mark.parametrize(
    "name",
    ["../model.onnx", "/etc/passwd", "a/b.onnx", "a\\b.onnx", "..", ".", "", ".hidden", "C:model", "a\n", "x\0y",
     "manifest.json", "Manifest.JSON", "golden.npz", "model."],
)  # fmt: skip
def test_file_name_that_leaves_the_folder_or_clashes_is_refused(manifest, name):
    with pytest.raises(BundleError, match="file name"):
        replace(manifest, artifacts=(replace(manifest.artifacts[0], file=name),))


def test_artifact_without_calibration_is_refused(manifest):
    with pytest.raises(BundleError, match="no calibration for int8"):
        replace(manifest, calibration={"fp32": CALIBRATION})


def test_two_graphs_of_one_precision_are_refused(manifest):
    double = replace(manifest.artifacts[0], file="other.onnx")
    with pytest.raises(BundleError, match="two ONNX graphs of one precision"):
        replace(manifest, artifacts=(manifest.artifacts[0], double))


def test_mistyped_field_is_refused_when_writing(manifest, tmp_path):
    broken = replace(manifest, tool_version=3)
    with pytest.raises(BundleError, match=r"manifest\.tool_version: got 3"):
        save_manifest(broken, tmp_path)
    assert list(tmp_path.glob("*.json")) == []


def test_number_that_is_not_finite_is_refused_when_writing(manifest, tmp_path):
    broken = replace(manifest, mean_trace=(float("nan"), *manifest.mean_trace[1:]))
    with pytest.raises(BundleError, match=r"mean_trace\[0\]: got nan, wanted a finite number"):
        save_manifest(broken, tmp_path)


def test_failed_write_leaves_the_old_manifest_and_no_temporary_file(manifest, tmp_path, monkeypatch):
    save_manifest(manifest, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    monkeypatch.setattr("runtime.replacing.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_manifest(replace(manifest, name="new"), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_sha256_of_a_file_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_calibration_agrees_with_a_hand_computed_case():
    spec = CalibrationSpec(2.0, 0.5, -1.0, 1.0, 0.01, 0.05)
    assert spec.calibrated([3.0]).tolist() == [2.0]
    assert spec.fake_probability([-1.0]).tolist() == [0.5]
    assert spec.fake_probability([3.0])[0] == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-15)


def test_probability_of_an_extreme_logit_is_finite_and_silent():
    assert CALIBRATION.fake_probability([-1e30, 1e30]).tolist() == [0.0, 1.0]


def test_verdict_is_inclusive_at_the_real_threshold_and_exclusive_at_the_fake_one():
    spec = CalibrationSpec(1.0, 0.0, -1.0, 1.0, 0.01, 0.05)
    logits = [-1.5, -1.0, -0.999, 0.0, 1.0, 1.001]
    assert spec.verdicts(logits).tolist() == ["real", "real", "uncertain", "uncertain", "uncertain", "fake"]


def test_equal_thresholds_leave_nothing_uncertain():
    spec = CalibrationSpec(1.0, 0.0, 0.5, 0.5, 0.01, 0.05)
    assert spec.verdicts([0.5, 0.5000001]).tolist() == ["real", "fake"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0, wanted more than 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"real_threshold": 1.0}, "real_threshold 1.0 above fake_threshold 0.31"),
        ({"real_flagged_rate": 1.5}, "a rate of 1.5"),
    ],
)
def test_calibration_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(BundleError, match=message):
        replace(CALIBRATION, **change)


def test_calibration_alone_survives_json():
    plain = json.loads(json.dumps(to_jsonable(CALIBRATION, subject="calibration")))
    assert from_jsonable(CalibrationSpec, plain, subject="calibration") == CALIBRATION


def test_bundle_from_before_the_rule_was_recorded_is_read_and_written_to_the_same_bytes(manifest):
    text = manifest_to_json(manifest)
    fields_then = {"temperature", "bias", "real_threshold", "fake_threshold", "real_flagged_rate", "fake_missed_rate"}
    assert set(json.loads(text)["calibration"]["fp32"]) == fields_then
    read = manifest_from_json(text)
    assert {spec.threshold_rule for spec in read.calibration.values()} == {"empirical"}
    assert manifest_to_json(read) == text


def test_conformal_rule_travels_with_the_bundle(manifest):
    conformal = {name: replace(spec, threshold_rule="conformal") for name, spec in manifest.calibration.items()}
    changed = replace(manifest, calibration=conformal)
    text = manifest_to_json(changed)
    assert manifest_from_json(text) == changed
    assert json.loads(text)["calibration"]["int8"]["threshold_rule"] == "conformal"


@pytest.mark.parametrize(
    ("rule", "message"), [("guessed", "threshold_rule: got 'guessed', wanted one of"), ("empirical", "manifest_sha256")]
)
def test_unknown_rule_and_a_second_way_to_write_the_default_are_refused(manifest, rule, message):
    plain = json.loads(manifest_to_json(manifest))
    plain["calibration"]["fp32"]["threshold_rule"] = rule
    with pytest.raises(BundleError, match=message):
        manifest_from_json(_rehashed(plain))


def test_an_engine_from_before_tf32_was_recorded_counts_as_one_that_uses_it(tmp_path):
    write_bundle(tmp_path / "m")
    for tf32 in (True, False):
        manifest = add_engine(tmp_path / "m", b"an engine", tf32=tf32, file=f"{tf32}.engine").manifest
    text = manifest_to_json(manifest)
    _, before, now = (artifact.get("engine", {}) for artifact in json.loads(text)["artifacts"])
    assert ("tf32" in before, now["tf32"]) == (False, False)
    assert [artifact.engine.tf32 for artifact in manifest_from_json(text).artifacts[1:]] == [True, False]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 5, 4)])
def test_profile_out_of_order_is_refused(sizes):
    with pytest.raises(BundleError, match="min_batch <= opt_batch <= max_batch"):
        ProfileSpec(*sizes)
