"""Ranges of activations and the four ways to clip them."""

from __future__ import annotations

import numpy as np
import pytest
from exported import batches, fp32_graph, images, magnitudes
from onnx import numpy_helper

from export.errors import ExportError
from export.graph import copy_of, initializers, store, with_outputs
from export.ranges import (
    CALIBRATORS,
    HISTOGRAM_BINS,
    PERCENTILE,
    clipped_ranges,
    largest_magnitudes,
    magnitude_histograms,
)
from export.session import open_session


def test_largest_magnitudes_are_those_of_all_batches():
    model, name = fp32_graph("test_resnet"), "embeddings"
    values = open_session(with_outputs(model, [name])).run(None, {"images": images()})[0]
    expected = pytest.approx(np.abs(values).max(), rel=1e-5)
    assert largest_magnitudes(model, [name], batches)[name] == expected
    assert largest_magnitudes(model, [name], lambda: list(batches())[::-1])[name] == expected


def test_a_tensor_that_is_not_finite_is_an_error_with_its_name():
    model = copy_of(fp32_graph("test_resnet"))
    bias = numpy_helper.to_array(initializers(model)["classifier.bias"]) * np.float32(np.nan)
    store(model, "classifier.bias", bias)
    with pytest.raises(ExportError, match=r"tensor logits: got infinity or NaN on a calibration picture"):
        largest_magnitudes(model, ["embeddings", "logits"], batches)


def test_histograms_count_every_value_once():
    model, largest = fp32_graph("test_resnet"), magnitudes("test_resnet")
    counts = magnitude_histograms(model, {"embeddings": largest["embeddings"]}, batches)["embeddings"]
    values = open_session(with_outputs(model, ["embeddings"])).run(None, {"images": images()})[0]
    expected, _ = np.histogram(np.abs(values), bins=HISTOGRAM_BINS, range=(0, largest["embeddings"]))
    assert counts.sum() == values.size
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1  # a value on an edge may fall either way


def clip(calibrator, counts, largest=6.0):
    return clipped_ranges(calibrator, {"t": np.asarray(counts, float)}, {"t": largest})["t"]


def with_outlier():
    """A million values in the lower half of the range, spread evenly, and one at its end."""
    counts = np.zeros(HISTOGRAM_BINS)
    counts[: HISTOGRAM_BINS // 2] = 1e6
    counts[-1] = 1.0
    return counts


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_even_values_are_not_clipped(calibrator):
    assert clip(calibrator, np.ones(HISTOGRAM_BINS)) == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize(("calibrator", "expected"), [("mse", 3.0), ("percentile", 3.0), ("minmax", 6.0)])
def test_an_outlier_is_clipped_except_by_the_whole_range(calibrator, expected):
    assert clip(calibrator, with_outlier()) == pytest.approx(expected, rel=0.1)


def test_entropy_clips_a_long_tail_but_not_the_body():
    magnitude = (np.arange(HISTOGRAM_BINS) + 0.5) * (6.0 / HISTOGRAM_BINS)
    long_tail = 1e7 * np.exp(-magnitude * 4)
    assert 0.3 * 6 <= clip("entropy", long_tail) < 0.8 * 6


def test_percentile_keeps_its_share_of_the_values():
    counts = np.ones(HISTOGRAM_BINS) * 100
    kept = clip("percentile", counts) / 6.0
    assert PERCENTILE / 100 <= kept < PERCENTILE / 100 + 1 / HISTOGRAM_BINS


def test_mse_clip_loses_less_than_its_neighbours():
    magnitude = (np.arange(HISTOGRAM_BINS) + 0.5) * (6.0 / HISTOGRAM_BINS)
    counts = 1e6 * np.exp(-(magnitude**2))

    def loss(limit):
        step = limit / 127
        return float(counts @ (np.minimum(np.round(magnitude / step), 127) * step - magnitude) ** 2)

    best = clip("mse", counts)
    assert loss(best) < min(loss(0.8 * best), loss(1.25 * best), loss(6.0))


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_the_range_of_a_tensor_that_is_always_zero_is_one(calibrator):
    assert clip(calibrator, np.zeros(HISTOGRAM_BINS), 0.0) == 1.0
