"""A score that depends on its batch is found: by place, by neighbours, and by batch size."""

from __future__ import annotations

import numpy as np
import pytest
from bundle_fixtures import SIZE, random_images, write_bundle

from export.batch_invariance import BATCH, LIMITS, check_batch_invariance, extreme_pictures
from runtime.backends import open_backend
from runtime.backends.base import Outputs
from runtime.bundle import open_bundle
from runtime.manifest import PRECISIONS

PICTURES = dict(zip(("real", "fake"), random_images(2, seed=9), strict=True)) | extreme_pictures(SIZE, SIZE)


class Scores:
    """A back-end whose logits are a function of the batch of means, which stand for the pictures."""

    name = "made up"

    def __init__(self, logits_of):
        self.logits_of, self.batches = logits_of, []

    def infer(self, images):
        self.batches.append(images)
        logits = self.logits_of(images.mean((1, 2, 3)) / 255)
        return Outputs(np.asarray(logits, np.float32), None, None, None)


def check(logits_of, precision="int8", **options):
    return check_batch_invariance(Scores(logits_of), PICTURES, precision=precision, unit=1.0, **options)


def test_scores_of_their_own_picture_alone_pass():
    result = check(lambda means: 3 * means)
    assert (result.logit_diff_max, result.broken(), result.batch) == (0.0, [], 64)


def test_a_range_measured_on_the_batch_fails_and_the_picture_is_named():
    def quantized(means):
        step = max(means.max(), 1e-9) / 15
        return np.round(means / step) * step

    (broken,) = check(quantized).broken()
    assert "of a batch of 64, at most 0.02" in broken
    assert any(f"the logit of {name} moves by" in broken for name in PICTURES)


@pytest.mark.parametrize("place", [0, 1, 31, BATCH - 1])
def test_a_single_wrong_place_is_found(place):
    def logits_of(means):
        logits = means.copy()
        if len(means) == BATCH:
            logits[place] += 0.5
        return logits

    result = check(logits_of)
    assert (result.worst_place, result.logit_diff_max) == (place, pytest.approx(0.5))


def test_a_score_that_knows_the_batch_size_fails():
    assert check(lambda means: means + 0.1 * (len(means) > 1)).broken()


def test_a_score_that_is_no_number_in_a_batch_fails():
    result = check(lambda means: np.where(np.arange(len(means)) == 5, np.nan, means))
    assert result.broken()
    assert result.worst_place == 5


def test_the_first_picture_stands_at_every_place_beside_every_other():
    backend = Scores(lambda means: means)
    check_batch_invariance(backend, PICTURES, precision="fp32", unit=1.0)
    assert [len(images) for images in backend.batches] == [1] * 6 + [64] * 2
    first, second = ((images == PICTURES["real"]).all((1, 2, 3)) for images in backend.batches[-2:])
    assert (first ^ second).all()
    for name, picture in PICTURES.items():
        assert all((images == picture).all((1, 2, 3)).any() for images in backend.batches[-2:]), name


def test_the_limit_is_in_units_of_evidence():
    moved = Scores(lambda means: means + 0.03 * (len(means) > 1))
    assert check_batch_invariance(moved, PICTURES, precision="int8", unit=1.0).broken()
    assert not check_batch_invariance(moved, PICTURES, precision="int8", unit=2.0).broken()


def test_extreme_pictures_reach_both_ends():
    extremes = extreme_pictures(6, 8)
    assert {name: (p.shape, p.dtype) for name, p in extremes.items()} == dict.fromkeys(extremes, ((6, 8, 3), np.uint8))
    assert extremes["black"].max() == 0
    assert extremes["white"].min() == 255
    board = extremes["checkerboard"]
    assert {int(board[0, 0, 0]), int(board[0, 1, 0])} == {0, 255}
    assert set(np.unique(board)) == {0, 255}
    assert (board[0, 0] == board[1, 1]).all()
    assert len(np.unique(extremes["noise"])) > 50


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_on_each_back_end_does_not_depend_on_the_batch(tmp_path, backend):
    write_bundle(tmp_path, precisions=PRECISIONS)
    bundle = open_bundle(tmp_path)
    for precision in PRECISIONS:
        artifact = bundle.manifest.onnx_artifact(precision)
        opened = open_backend(backend, bundle.read(artifact), bundle.manifest, file=artifact.file)
        result = check_batch_invariance(opened, PICTURES, precision=precision, unit=0.1)
        assert (result.precision, result.backend, result.broken()) == (precision, backend, [])


def test_every_precision_has_a_limit_with_its_reason():
    assert set(LIMITS) == set(PRECISIONS)
    assert all(limit.reason and limit.logit_diff_max < 0.05 for limit in LIMITS.values())
