from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, PRECISION_OFFSET, numpy_outputs, random_images, write_bundle, zip_bundle
from PIL import Image

from runtime import Detector
from runtime.errors import BackendError, BundleError, PictureError, PictureFormatError, UsageError

ROOT = Path(__file__).parents[1]
BACKENDS = ("onnxruntime", "openvino")
# Largest difference measured between a picture alone and in a batch of 33, over both back-ends: 6e-8.
BATCH_TOLERANCE = 1e-6


@pytest.fixture
def detector(tiny_bundle):
    with Detector.load(tiny_bundle, backend="onnxruntime") as opened:
        yield opened


def _png(rgb):
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()


def _assert_scored(detection, rgb):
    outputs = numpy_outputs(rgb[None])
    logit = outputs["logits"][0]
    assert detection.error is None
    assert detection.fake_probability == pytest.approx(1 / (1 + np.exp(-(logit / 0.5 - 0.5))), abs=1e-6)
    assert detection.trace_similarity == pytest.approx(outputs["trace_similarity"][0], abs=1e-6)
    assert detection.verdict == CALIBRATION.verdicts(logit)
    np.testing.assert_allclose(detection.evidence, outputs["evidence"][0] / 0.5 - 0.5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_agrees_with_numpy(tiny_bundle, backend):
    images = random_images(5)
    with Detector.load(tiny_bundle, backend=backend) as opened:
        detections = opened.predict(images)
    for detection, rgb in zip(detections, images, strict=True):
        _assert_scored(detection, rgb)
        assert detection.evidence.dtype == np.float32
    assert len(detections) == 5


def test_all_three_verdicts_follow_the_thresholds(detector):
    images = random_images(200, seed=5)
    logits = numpy_outputs(images)["logits"]
    verdicts = [detection.verdict for detection in detector.predict(images)]
    assert verdicts == CALIBRATION.verdicts(logits).tolist()
    assert set(verdicts) == {"real", "uncertain", "fake"}


def test_every_kind_of_source_is_scored_in_order(detector, tmp_path):
    images = random_images(6)
    path = tmp_path / "a b ü.png"
    path.write_bytes(_png(images[0]))
    second = tmp_path / "second.png"
    second.write_bytes(_png(images[1]))
    sources = [
        str(path),
        second,
        _png(images[2]),
        io.BytesIO(_png(images[3])),
        Image.fromarray(images[4]),
        images[5],
    ]
    detections = detector.predict(sources)
    for detection, rgb in zip(detections, images, strict=True):
        _assert_scored(detection, rgb)
    assert [detection.source for detection in detections] == [
        str(path),
        str(second),
        f"#2 ({len(sources[2])} bytes)",
        "#3 (BytesIO object)",
        "#4 (Image object)",
        "#5 (array (16, 16, 3))",
    ]


def test_picture_of_another_size_is_cropped_at_its_middle(detector):
    large = np.random.default_rng(1).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    _assert_scored(detector.predict([large])[0], large[12:28, 22:38])


def test_bad_picture_gets_an_error_and_the_rest_goes_on(detector, tmp_path):
    images = random_images(2)
    sources = [images[0], tmp_path / "gone.jpg", b"text", images[1], tmp_path]
    first, gone, text, last, folder = detector.predict(sources, batch_size=2)
    _assert_scored(first, images[0])
    _assert_scored(last, images[1])
    assert "gone.jpg: got no such file" in gone.error
    assert "no known picture format" in text.error
    assert "got a folder" in folder.error
    assert [type(one.cause) for one in (gone, text, folder)] == [PictureError, PictureFormatError, PictureError]
    assert [str(one.cause) for one in (gone, text, folder)] == [gone.error, text.error, folder.error]
    for failed in (gone, text, folder):
        assert (failed.fake_probability, failed.verdict, failed.trace_similarity, failed.evidence) == (None,) * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_does_not_depend_on_the_batch(tiny_bundle, backend):
    images = random_images(33)
    with Detector.load(tiny_bundle, backend=backend) as opened:
        alone = [opened.predict([rgb])[0].fake_probability for rgb in images]
        for batch_size in (1, 2, 8, 32, 1000):
            batch = [d.fake_probability for d in opened.predict(images, batch_size=batch_size)]
            np.testing.assert_allclose(batch, alone, atol=BATCH_TOLERANCE, rtol=0)
        mixed = [d.fake_probability for d in opened.predict([b"bad", *images, b"bad"])][1:-1]
    np.testing.assert_allclose(mixed, alone, atol=BATCH_TOLERANCE, rtol=0)


def test_no_pictures_give_no_detections(detector):
    assert detector.predict([]) == []


@pytest.mark.parametrize(
    "single",
    ["a.jpg", Path("a.jpg"), b"bytes", random_images(1)[0], Image.new("RGB", (4, 4)), io.BytesIO(b"x"), 5, None],
)
def test_single_picture_instead_of_a_list_is_refused(detector, single):
    with pytest.raises(UsageError, match=r"put a single picture in a list: predict\(\[picture\]\)"):
        detector.predict(single)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "8", None])
def test_batch_size_that_makes_no_sense_is_refused(detector, batch_size):
    with pytest.raises(UsageError, match=r"batch_size: got .*, wanted a whole number of at least 1"):
        detector.predict([], batch_size=batch_size)


@pytest.mark.parametrize("options", [{"threads": 0}, {"max_pixels": 0}, {"max_pixels": 1e6}])
def test_option_that_makes_no_sense_is_refused(tiny_bundle, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Detector.load(tiny_bundle, **options)


def test_pixel_limit_is_kept_for_each_picture(tiny_bundle):
    with Detector.load(tiny_bundle, backend="onnxruntime", max_pixels=256) as opened:
        fits, too_large = opened.predict([random_images(1)[0], np.zeros((16, 17, 3), np.uint8)])
    assert fits.error is None
    assert "17x16 pixels, wanted at most 256 pixels" in too_large.error


def test_info_says_what_really_runs(tiny_bundle):
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as opened:
        info = opened.info
    assert (info.model, info.location) == ("tiny", str(tiny_bundle))
    assert (info.backend, info.device, info.precision) == ("onnxruntime", "cpu", "fp32")
    assert info.artifact == "model.fp32.onnx"
    assert info.backend_version[0].isdigit()
    assert "as asked" in info.reason
    with pytest.raises(FrozenInstanceError):
        info.device = "cuda:0"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_that_was_asked_for_runs_with_its_own_calibration(tmp_path, precision):
    write_bundle(tmp_path / "m", precisions=("fp32", "fp16", "int8"))
    rgb = random_images(1)[0]
    with Detector.load(tmp_path / "m", backend="onnxruntime", precision=precision) as opened:
        detection = opened.predict([rgb])[0]
        assert opened.info.precision == precision
    offset = PRECISION_OFFSET[precision]
    expected = numpy_outputs(rgb[None], offset=offset)
    np.testing.assert_allclose(detection.evidence, expected["evidence"][0] / 0.5 - 0.5, atol=1e-4)
    assert detection.verdict == CALIBRATION.verdicts(expected["logits"][0] - offset)


def test_zip_gives_the_same_scores_as_its_folder(tiny_bundle, tmp_path):
    images = random_images(3)
    results = []
    for model in (tiny_bundle, zip_bundle(tiny_bundle, tmp_path / "m.zip")):
        with Detector.load(model, backend="onnxruntime") as opened:
            results.append([detection.to_json() for detection in opened.predict(images)])
    assert results[0] == results[1]


def test_damaged_bundle_is_refused_before_a_backend_is_tried(tiny_bundle, monkeypatch):
    path = tiny_bundle / "model.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    monkeypatch.setattr("runtime.detector.open_backend", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(BundleError, match="SHA-256"):
        Detector.load(tiny_bundle)


def test_backend_that_cannot_run_is_an_error_and_not_another_device(tiny_bundle):
    from runtime.backends import probe_backend

    if probe_backend("onnxruntime-cuda").runs:
        pytest.skip("CUDA runs here")
    with pytest.raises(BackendError, match="back-end onnxruntime-cuda"):
        Detector.load(tiny_bundle, backend="onnxruntime-cuda")


def test_closed_detector_refuses_and_may_be_closed_twice(tiny_bundle):
    opened = Detector.load(tiny_bundle, backend="onnxruntime")
    started = opened.stream(iter(random_images(3)), batch_size=1)
    next(started)
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="got a closed one"):
        opened.predict([])
    with pytest.raises(UsageError, match="got a closed one"):
        next(started)
    assert "closed" in repr(opened)


def test_warming_up_infers_a_batch_of_each_size(detector, monkeypatch):
    infer, sizes = detector._backend.infer, []
    monkeypatch.setattr(detector._backend, "infer", lambda images: sizes.append(images.shape) or infer(images))
    detector.warm_up(1, 5)
    assert sizes == [(1, 16, 16, 3), (5, 16, 16, 3)]
    with pytest.raises(UsageError, match="batch size: got 0"):
        detector.warm_up(0)


def test_detection_as_json_has_exactly_its_field_names(detector):
    good, bad = detector.predict([random_images(1)[0], b""])
    fields = ["source", "fake_probability", "verdict", "trace_similarity", "evidence", "error", "stability"]
    for detection in (good, bad):
        plain = json.loads(json.dumps(detection.to_json(), allow_nan=False))
        assert list(plain) == fields
    np.testing.assert_allclose(good.to_json()["evidence"], good.evidence, atol=1e-5)
    assert bad.to_json()["evidence"] is None


def test_detection_cannot_be_changed(detector):
    with pytest.raises(FrozenInstanceError):
        detector.predict([random_images(1)[0]])[0].verdict = "real"


def test_output_that_is_not_finite_becomes_an_error_of_that_picture(detector, monkeypatch):
    real_infer = detector._backend.infer

    def broken_infer(images):
        outputs = real_infer(images)
        outputs.logits[1] = np.nan
        return outputs

    monkeypatch.setattr(detector._backend, "infer", broken_infer)
    first, second, third = detector.predict(random_images(3))
    assert "not a finite number" in second.error
    assert isinstance(second.cause, BackendError)  # the fault is not the picture's
    assert second.fake_probability is None
    assert first.error is None
    assert third.error is None


def test_output_of_another_count_is_refused(detector, monkeypatch):
    session = detector._backend._session

    class Short:
        def run(self, names, feeds):
            return [array[:-1] for array in session.run(names, feeds)]

    monkeypatch.setattr(detector._backend, "_session", Short())
    with pytest.raises(BackendError, match=r"output logits: got shape \(2,\), wanted \(3,\)"):
        detector.predict(random_images(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_may_predict_at_once(tiny_bundle, backend):
    images = random_images(24)
    pictures = [_png(rgb) for rgb in images]
    with Detector.load(tiny_bundle, backend=backend) as opened:
        expected = [d.fake_probability for d in opened.predict(pictures)]
        results = {}

        def work(index):
            results[index] = [d.fake_probability for d in opened.predict(pictures, batch_size=5)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    for result in results.values():
        np.testing.assert_allclose(result, expected, atol=BATCH_TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_process_lives_on_while_detectors_and_threads_come_and_go(tiny_bundle, backend):
    code = (
        "import sys, threading\n"
        "import numpy as np\n"
        "from runtime import Detector\n"
        "images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)\n"
        "for _ in range(60):\n"
        "    with Detector.load(sys.argv[1], backend=sys.argv[2]) as detector:\n"
        "        detector.predict(images)\n"
        "        threads = [threading.Thread(target=detector.predict, args=(images,), kwargs={'batch_size': 5})"
        " for _ in range(4)]\n"
        "        for thread in threads: thread.start()\n"
        "        for thread in threads: thread.join()\n"
        "print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle, backend], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr[-2000:]


def test_one_pillow_image_given_many_times_is_scored_each_time(detector, tmp_path):
    # Large enough that decoding it in two threads at once would collide.
    rgb = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(_png(rgb))
    with Image.open(tmp_path / "a.png") as image:
        for detection in detector.predict([image] * 8):
            _assert_scored(detection, rgb[592:608, 592:608])
            assert detection.source == str(tmp_path / "a.png")


def test_place_of_a_nameless_picture_is_counted_over_all_batches(detector):
    names = [detection.source for detection in detector.predict([b"x"] * 5, batch_size=2)]
    assert names == [f"#{index} (1 bytes)" for index in range(5)]
