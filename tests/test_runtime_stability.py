"""Changed pictures are what changing the whole picture gives; and a verdict that flips on one becomes uncertain."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, SIZE, numpy_outputs
from PIL import Image

from runtime import Detector
from runtime.changes import CHANGES, UNCHANGED, Looks, Reencoded, Rescaled, picture_crops
from runtime.decode import decode_part, decode_picture
from runtime.preprocess import Part, PreprocessSpec, prepare
from runtime.stability import stability_of
from runtime.views import VIEWS, part_at, view_anchors

SPEC = PreprocessSpec(height=SIZE, width=SIZE)
# Largest difference seen between resampling a part and resampling the whole, whose positions are rounded elsewhere.
LEVELS = 2
NAMES = ["unchanged", "jpeg 95", "jpeg 85", "jpeg 75", "scale 0.75", "scale 1.25"]


@pytest.fixture(scope="module")
def detector(_pristine_bundle):
    with Detector.load(_pristine_bundle, backend="onnxruntime", threads=1) as opened:
        yield opened


def _picture(height, width, seed=0):
    """Colour fields that change within a few pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _changed_as_a_whole(change, rgb):
    if isinstance(change, Reencoded):
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "JPEG", quality=change.quality)
        return decode_picture(file.getvalue())
    if isinstance(change, Rescaled):
        height, width = (max(1, round(size * change.factor)) for size in rgb.shape[:2])
        along_rows = Image.fromarray(rgb).resize((width, rgb.shape[0]), Image.Resampling.BICUBIC)
        return np.asarray(along_rows.resize((width, height), Image.Resampling.BICUBIC))
    return rgb


def _crops_as_a_whole(rgb, views):
    """(changes, views, SIZE, SIZE, 3), each picture changed as a whole and then cropped."""
    anchors = view_anchors(*rgb.shape[:2], SPEC, views)
    changed = [_changed_as_a_whole(change, rgb) for change in CHANGES]
    return np.stack([[prepare(part_at(a, *c.shape[:2], SPEC).of(c), SPEC) for a in anchors] for c in changed])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_part_of_a_changed_picture_needs_only_what_it_says(change, seed):
    rng = np.random.default_rng(seed)
    height, width = (int(size) for size in rng.integers(1, 120, 2))
    rgb = _picture(height, width, seed)
    whole = _changed_as_a_whole(change, rgb)
    assert whole.shape[:2] == change.size(height, width)
    rows, columns = (int(rng.integers(1, size + 1)) for size in whole.shape[:2])
    top, left = int(rng.integers(0, whole.shape[0] - rows + 1)), int(rng.integers(0, whole.shape[1] - columns + 1))
    part = Part(top, left, rows, columns)
    found = change.pixels(part, decode_part(rgb, lambda *size: change.needs(part, *size)))
    tolerance = LEVELS if isinstance(change, Rescaled) else 0
    assert found.shape == (rows, columns, 3)
    assert np.abs(found.astype(int) - part.of(whole)).max() <= tolerance


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_part_whose_borders_are_those_of_blocks_is_smoothed_across_them(change):
    rgb, part = _picture(96, 120), Part(32, 48, 16, 32)
    found = change.pixels(part, decode_part(rgb, lambda *size: change.needs(part, *size)))
    tolerance = LEVELS if isinstance(change, Rescaled) else 0
    assert np.abs(found.astype(int) - part.of(_changed_as_a_whole(change, rgb))).max() <= tolerance


def test_changes_have_names_of_their_own_and_begin_with_the_picture_as_it_is():
    assert [change.name for change in CHANGES] == NAMES
    assert CHANGES[:1] == UNCHANGED


@pytest.mark.parametrize("size", [(40, 61), (16, 16), (3, 90), (130, 130)])
@pytest.mark.parametrize("views", VIEWS)
def test_crops_are_those_of_each_changed_picture(views, size):
    rgb = _picture(*size)
    crops = picture_crops(rgb, SPEC, Looks(views, CHANGES), max_pixels=10**6)
    expected = _crops_as_a_whole(rgb, views)
    assert len(crops) == expected.shape[0] * expected.shape[1] <= Looks(views, CHANGES).most_crops
    assert np.abs(np.stack(crops).astype(int) - expected.reshape(-1, SIZE, SIZE, 3)).max() <= LEVELS


def test_scores_of_changed_pictures_decide_whether_the_verdict_holds(detector):
    colours = np.random.default_rng(8).integers(0, 256, (12, 1, 1, 3), dtype=np.uint8)
    pictures = [_picture(60, 70, seed) for seed in range(20)] + [np.tile(colour, (60, 70, 1)) for colour in colours]
    plain = detector.predict(pictures, views="five")
    found = detector.predict(pictures, views="five", stability=True, batch_size=20)
    for rgb, before, detection in zip(pictures, plain, found, strict=True):
        crops = _crops_as_a_whole(rgb, "five")
        logits = numpy_outputs(crops.reshape(-1, SIZE, SIZE, 3))["logits"].reshape(len(CHANGES), -1).mean(axis=1)
        probabilities, stability = CALIBRATION.fake_probability(logits), detection.stability
        assert list(stability.fake_probabilities) == NAMES
        # What resampling may be off by, the logit hardly feels.
        np.testing.assert_allclose(list(stability.fake_probabilities.values()), probabilities, atol=2e-3)
        assert stability.spread == pytest.approx(np.ptp(list(stability.fake_probabilities.values())))
        assert stability.verdict == before.verdict
        assert detection.verdict == ("uncertain" if stability.flips else before.verdict)
        assert detection.fake_probability == pytest.approx(before.fake_probability, abs=1e-6)
        np.testing.assert_allclose(detection.evidence, before.evidence, atol=1e-5)
    held = {(d.stability.flips, d.stability.verdict) for d in found}
    assert {(True, "real"), (False, "real"), (True, "fake"), (False, "fake")} <= held
    assert {before.stability for before in plain} == {None}


def test_spread_and_flips_by_hand():
    verdicts = np.array(["fake", "fake", "uncertain"])
    found = stability_of(CHANGES[:3], np.array([0.9, 0.95, 0.5]), verdicts)
    assert (found.spread, found.flips, found.verdict) == (pytest.approx(0.45), True, "fake")
    assert found.fake_probabilities == {"unchanged": 0.9, "jpeg 95": 0.95, "jpeg 85": 0.5}
    held = stability_of(CHANGES[:2], np.array([0.9, 0.95]), verdicts[:2])
    assert not held.flips


def test_picture_of_one_colour_hardly_moves(detector):
    found = detector.predict([np.full((50, 50, 3), 128, np.uint8)], stability=True)[0]
    assert found.stability.spread < 0.01
    assert not found.stability.flips


def test_json_holds_the_stability_and_a_failed_picture_has_none(detector):
    good, bad = detector.predict([_picture(40, 40), b"no picture"], stability=True)
    plain = json.loads(json.dumps(good.to_json(), allow_nan=False))["stability"]
    assert list(plain) == ["spread", "flips", "verdict", "fake_probabilities"]
    assert plain["fake_probabilities"]["unchanged"] == good.fake_probability
    assert bad.to_json()["stability"] is None
    assert "no known picture format" in bad.error


def test_changed_score_that_is_not_finite_is_an_error_of_the_picture(detector, monkeypatch):
    infer = detector._backend.infer

    def broken(images):
        outputs = infer(images)
        outputs.logits[len(NAMES) - 1] = np.nan
        return outputs

    monkeypatch.setattr(detector._backend, "infer", broken)
    first, second = detector.predict([_picture(40, 40), _picture(40, 41)], stability=True)
    assert "not a finite number" in first.error
    assert second.error is None


def test_limit_on_pixels_of_the_host_does_not_reach_what_is_encoded_here(monkeypatch):
    rgb = _picture(64, 64)
    expected = picture_crops(rgb, SPEC, Looks("center", CHANGES), max_pixels=10**6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(picture_crops(rgb, SPEC, Looks("center", CHANGES), max_pixels=10**6), expected)
