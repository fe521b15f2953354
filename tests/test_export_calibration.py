"""Calibration pictures and what is measured on them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from exported import batches, fp32_graph, images, magnitudes, pictures
from onnx import numpy_helper

from export.calibration import (
    HISTOGRAM_BINS,
    PreparedPictures,
    calibration_pictures,
    clipped_range,
    largest_magnitudes,
    magnitude_histograms,
    open_session,
)
from export.errors import ExportError
from export.graph import copy_of, initializers, store, with_outputs
from runtime.preprocess import PreprocessSpec
from train.data import load_split

SPEC = PreprocessSpec(160, 160)


@pytest.fixture
def validation():
    return load_split(pictures(), "val")


def test_the_list_is_fixed_evenly_spaced_and_hashed(validation):
    chosen = calibration_pictures(validation, SPEC, limit=8)
    assert chosen == calibration_pictures(validation, SPEC, limit=8)
    assert len(chosen) == 8
    assert [record.label for record in chosen.pictures.records].count(1) == 4
    assert chosen.pictures.records[0] == validation.records[0]
    assert chosen.pictures.records[-1] == validation.records[-1]
    assert chosen.sha256 != calibration_pictures(validation, SPEC, limit=7).sha256


def test_a_limit_above_the_number_of_pictures_takes_each_once(validation):
    chosen = calibration_pictures(validation, SPEC, limit=1000)
    assert chosen.pictures.records == validation.records
    assert chosen.sha256 == validation.content_sha256()


def test_batches_are_prepared_in_order_and_again_at_each_call(validation):
    chosen = calibration_pictures(validation, SPEC, limit=5)
    first, second = (list(chosen.batches(2)) for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 160, 160, 3), (2, 160, 160, 3), (1, 160, 160, 3)]
    assert all(batch.dtype == np.uint8 for batch in first)
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def test_a_picture_that_does_not_decode_stops_the_export(tmp_path):
    folder = shutil.copytree(pictures(), tmp_path / "pictures")
    broken = sorted(folder.rglob("val/**/*.png"))[3]
    broken.write_bytes(b"not a picture")
    chosen = PreparedPictures(load_split(folder, "val"), SPEC, "0" * 64)
    with pytest.raises(ExportError, match=f"picture .*{broken.name}: got"):
        list(chosen.batches())


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


def test_range_of_even_values_is_not_clipped_and_of_an_outlier_is():
    even = np.ones(HISTOGRAM_BINS)
    assert clipped_range(even, 6.0) == pytest.approx(6.0, rel=0.02)
    lonely = np.zeros(HISTOGRAM_BINS)
    lonely[: HISTOGRAM_BINS // 2] = 1e6
    lonely[-1] = 1.0
    assert clipped_range(lonely, 6.0) == pytest.approx(3.0, rel=0.1)


def test_range_of_a_tensor_that_is_always_zero_is_one():
    assert clipped_range(np.zeros(HISTOGRAM_BINS), 0.0) == 1.0


def test_another_picture_changes_the_hash(validation):
    fewer = replace(validation, records=validation.records[1:])
    assert calibration_pictures(fewer, SPEC).sha256 != calibration_pictures(validation, SPEC).sha256
