"""Which parts of a picture are looked at, and that their logits are averaged before anything is decided."""

from __future__ import annotations

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, SIZE, numpy_outputs

from runtime import Detector
from runtime.errors import UsageError
from runtime.preprocess import Part, PreprocessSpec, prepare
from runtime.views import VIEWS, bounding_part, most_views, part_at, view_anchors

SPEC = PreprocessSpec(height=6, width=8)
COUNT = {"center": 1, "five": 5, "grid": 9}


def _noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def view_parts(height, width, spec, views):
    return [part_at(anchor, height, width, spec) for anchor in view_anchors(height, width, spec, views)]


@pytest.fixture(scope="module")
def detector(_pristine_bundle):
    with Detector.load(_pristine_bundle, backend="onnxruntime", threads=1) as opened:
        yield opened


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 8), (7, 9), (5, 40), (40, 3), (13, 17), (100, 101)])
def test_views_lie_inside_differ_and_begin_with_the_middle(views, height, width):
    parts = view_parts(height, width, SPEC, views)
    assert len(set(parts)) == len(parts) <= most_views(views) == COUNT[views]
    assert parts[0] == ((max(0, height - 6)) // 2, (max(0, width - 8)) // 2, min(6, height), min(8, width))
    for part in parts:
        assert 0 <= part.top <= part.top + part.height <= height
        assert 0 <= part.left <= part.left + part.width <= width
    assert set(view_parts(height, width, SPEC, "five")) <= set(view_parts(height, width, SPEC, "grid"))


def test_five_views_of_a_large_picture_are_the_middle_and_the_corners():
    corners = [Part(top, left, 6, 8) for top in (0, 24) for left in (0, 42)]
    assert view_parts(30, 50, SPEC, "five") == [Part(12, 21, 6, 8), *corners]
    assert len(view_parts(30, 50, SPEC, "grid")) == 9


def test_bounding_part_holds_all_parts_and_no_more():
    assert bounding_part([Part(5, 9, 2, 3), Part(1, 10, 3, 4)]) == Part(1, 9, 6, 5)
    assert Part(5, 9, 2, 3).within(Part(1, 9, 6, 5)) == Part(4, 0, 2, 3)


def test_picture_no_larger_than_a_view_has_one_view_and_a_long_one_three():
    assert view_parts(6, 8, SPEC, "grid") == [Part(0, 0, 6, 8)]
    assert view_parts(2, 50, SPEC, "five") == [Part(0, 21, 2, 8), Part(0, 0, 2, 8), Part(0, 42, 2, 8)]


@pytest.mark.parametrize("size", [(40, 61), (16, 16), (9, 70), (3, 5)])
@pytest.mark.parametrize("views", VIEWS)
def test_logits_and_similarities_are_averaged_before_the_calibration(detector, views, size):
    rgb = _noise(*size)
    spec = PreprocessSpec(height=SIZE, width=SIZE)
    crops = [prepare(part.of(rgb), spec) for part in view_parts(*size, spec, views)]
    outputs = numpy_outputs(np.stack(crops))
    logit = outputs["logits"].mean()
    found = detector.predict([rgb], views=views, batch_size=4)[0]
    assert found.fake_probability == pytest.approx(CALIBRATION.fake_probability(logit), abs=1e-6)
    assert found.verdict == CALIBRATION.verdicts(logit)
    assert found.trace_similarity == pytest.approx(outputs["trace_similarity"].mean(), abs=1e-6)
    np.testing.assert_allclose(found.evidence, CALIBRATION.calibrated(outputs["evidence"][0]), atol=1e-5)


def test_views_change_the_score_of_a_picture_that_is_not_the_same_everywhere(detector):
    scores = {detector.predict([_noise(40, 61)], views=views)[0].fake_probability for views in VIEWS}
    assert len(scores) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_views_of_one_picture_do_not_reach_the_next_whatever_the_batch(detector, batch_size):
    pictures = [_noise(40, 61), b"no picture", _noise(16, 16), _noise(20, 90), b""]
    alone = [detector.predict([picture], views="grid")[0].fake_probability for picture in pictures]
    together = [d.fake_probability for d in detector.predict(pictures, views="grid", batch_size=batch_size)]
    assert [score is None for score in together] == [False, True, False, False, True]
    assert together == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("views", ["centre", "", None, 5, ["five"]])
def test_views_that_there_are_not_are_refused_before_a_picture_is_read(detector, views):
    with pytest.raises(UsageError, match=r"views: got .*, wanted one of center, five, grid"):
        detector.stream(iter([b"never read"]), views=views)
