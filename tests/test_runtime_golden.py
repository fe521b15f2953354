"""Golden inputs: right outputs pass, wrong ones are refused in a sentence, at load and from the command line."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images, write_bundle
from PIL import Image

from runtime import Detector, cli
from runtime.backends import open_backend
from runtime.backends.ort import OrtBackend
from runtime.bundle import open_bundle
from runtime.errors import BackendError, BundleError
from runtime.golden import STORED_FROM, check_golden, golden_tolerance, require_golden
from runtime.manifest import PRECISIONS, save_manifest


def golden_arrays(precision="fp32"):
    """What an export would store for the tiny graph."""
    images = random_images(4, seed=3)
    outputs = numpy_outputs(images)
    return {"images": images} | {f"{precision}.{name}": v.astype(np.float32) for name, v in outputs.items()}


def store_golden(folder, arrays):
    """Put other golden inputs into a bundle whose manifest knows their hash."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    data = stream.getvalue()
    manifest = open_bundle(folder).manifest
    (folder / manifest.golden.file).write_bytes(data)
    golden = replace(manifest.golden, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    save_manifest(replace(manifest, golden=golden), folder)


def opened(bundle, backend="onnxruntime", precision="fp32"):
    artifact = bundle.manifest.onnx_artifact(precision)
    return open_backend(backend, bundle.read(artifact), bundle.manifest, file=artifact.file)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_right_outputs_pass_with_every_output_compared(tiny_bundle, backend):
    store_golden(tiny_bundle, golden_arrays())
    bundle = open_bundle(tiny_bundle)
    check = require_golden(bundle, opened(bundle, backend), "fp32")
    assert list(check.differences) == ["logits", "trace_similarity", "embeddings", "evidence"]
    assert 0 < max(check.differences.values()) < 1e-5
    assert (check.backend, check.broken()) == (backend, [])


@pytest.mark.parametrize("output", ["logits", "trace_similarity", "embeddings", "evidence"])
def test_each_output_that_is_wrong_is_named(tiny_bundle, output):
    arrays = golden_arrays()
    arrays[f"fp32.{output}"] *= np.float32(1.001)
    store_golden(tiny_bundle, arrays)
    bundle = open_bundle(tiny_bundle)
    (broken,) = check_golden(bundle, opened(bundle), "fp32").broken()
    assert broken.startswith(f"{output} off by 0.0999 %, at most 0.0")


def test_an_output_that_is_no_number_is_wrong(tiny_bundle):
    class Silent:
        name, device, version = "onnxruntime", "cpu", "1"

        def infer(self, images):
            outputs = opened(bundle).infer(images)
            return outputs._replace(logits=np.full_like(outputs.logits, np.nan))

    bundle = open_bundle(tiny_bundle)
    with pytest.raises(BackendError, match="logits off by nan %"):
        require_golden(bundle, Silent(), "fp32")


def test_detector_refuses_wrong_outputs_only_when_asked_and_closes_the_back_end(tiny_bundle, monkeypatch):
    arrays = golden_arrays()
    arrays["fp32.logits"][1] += 1
    store_golden(tiny_bundle, arrays)
    closed = []
    monkeypatch.setattr(OrtBackend, "close", lambda self: closed.append(self.name))
    Detector.load(tiny_bundle, backend="onnxruntime").close()
    closed.clear()
    with pytest.raises(BackendError, match=r"at fp32 on onnxruntime .* got logits off by .* do not trust its scores"):
        Detector.load(tiny_bundle, backend="onnxruntime", check_golden=True)
    assert closed == ["onnxruntime"]


def test_detector_with_right_outputs_scores_as_ever(tiny_bundle):
    images = random_images(2)
    with Detector.load(tiny_bundle, backend="onnxruntime", check_golden=True) as detector:
        checked = [d.fake_probability for d in detector.predict(images)]
    with Detector.load(tiny_bundle, backend="onnxruntime") as detector:
        assert checked == [d.fake_probability for d in detector.predict(images)]


def test_bundle_without_golden_inputs_is_refused(tmp_path):
    write_bundle(tmp_path, golden=None)
    with pytest.raises(BundleError, match="a bundle without golden inputs"):
        Detector.load(tmp_path, backend="onnxruntime", check_golden=True)


def test_precision_without_golden_outputs_is_refused(tmp_path):
    write_bundle(tmp_path, precisions=("int8",))
    with pytest.raises(BundleError, match=r"golden\.npz: got no int8\.logits, wanted outputs of the int8 graph"):
        Detector.load(tmp_path, backend="onnxruntime", precision="int8", check_golden=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fp32.logits": np.zeros(3, np.float32)}, r"logits of shape \(3,\)"),
        ({"fp32.logits": np.full(4, np.nan, np.float32)}, r"wanted finite values of shape \(4,\)"),
        ({"images": random_images(3)}, r"images of shape \(3, 16, 16, 3\)"),
        ({"images": random_images(4).astype(np.int64)}, "images of type int64"),
    ],
)
def test_golden_inputs_that_do_not_fit_the_model_are_refused(tiny_bundle, change, words):
    store_golden(tiny_bundle, golden_arrays() | change)
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(BundleError, match=words):
        check_golden(bundle, opened(bundle), "fp32")


def test_every_precision_has_a_tolerance_which_is_widest_for_int8_elsewhere():
    same = [golden_tolerance(precision, STORED_FROM).scores for precision in PRECISIONS]
    assert same == sorted(same)
    assert golden_tolerance("int8", "openvino").scores > golden_tolerance("int8", STORED_FROM).scores
    assert golden_tolerance("int8", "openvino").embeddings < 0.1
    assert all(golden_tolerance(precision, "openvino").reason for precision in PRECISIONS)


def test_command_line_checks_before_it_scores(tiny_bundle, tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.fromarray(random_images(1)[0]).save(picture)
    asked = ["predict", "--model", str(tiny_bundle), "--backend", "onnxruntime", "--check-golden", str(picture)]
    assert cli.main(asked) == 0
    assert "golden inputs give what they gave at export" in capsys.readouterr().err
    store_golden(tiny_bundle, golden_arrays() | {"fp32.logits": np.ones(4, np.float32)})
    assert cli.main(asked) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "ntf: golden inputs of" in shown.err
