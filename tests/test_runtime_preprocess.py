from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import PictureError, UsageError
from runtime.preprocess import PreprocessSpec, center_crop, pad_to, prepare

SPEC = PreprocessSpec(height=6, width=8)


def _picture(height, width, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("height", [1, 2, 5, 6, 7, 13, 100])
@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 101])
def test_prepared_picture_equals_numpy_padding_then_centre_crop(height, width):
    rgb = _picture(height, width)
    rows, columns = max(0, 6 - height), max(0, 8 - width)
    edges = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    padded = np.pad(rgb, edges, mode="symmetric")
    top, left = (padded.shape[0] - 6) // 2, (padded.shape[1] - 8) // 2
    result = prepare(rgb, SPEC)
    np.testing.assert_array_equal(result, padded[top : top + 6, left : left + 8])
    assert result.flags.c_contiguous
    assert result.dtype == np.uint8


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (4, 3)])
def test_order_of_padding_and_cropping_does_not_matter(height, width):
    rgb = _picture(height, width)
    np.testing.assert_array_equal(prepare(rgb, SPEC), center_crop(pad_to(rgb, 6, 8), 6, 8))


def test_single_pixel_fills_the_whole_input():
    rgb = np.array([[[1, 2, 3]]], np.uint8)
    assert (prepare(rgb, PreprocessSpec()) == np.array([1, 2, 3])).all()


def test_mirroring_repeats_the_border_by_hand():
    row = np.array([[[1] * 3, [2] * 3, [3] * 3]], np.uint8)
    assert pad_to(row, 1, 8)[0, :, 0].tolist() == [2, 1, 1, 2, 3, 3, 2, 1]


def test_large_picture_is_cropped_at_its_middle_without_resampling():
    rgb = _picture(11, 13)
    np.testing.assert_array_equal(prepare(rgb, SPEC), rgb[2:8, 2:10])


def test_picture_that_fits_is_kept_as_it_is():
    rgb = _picture(6, 8)
    np.testing.assert_array_equal(prepare(rgb, SPEC), rgb)
    assert pad_to(rgb, 6, 8) is rgb


def test_input_is_not_changed_and_may_be_a_view():
    rgb = _picture(20, 20)[::-1, ::2]
    before = rgb.copy()
    prepare(rgb, SPEC)
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        [[1, 2, 3]],
    ],
)
@pytest.mark.parametrize("function", [lambda a: pad_to(a, 6, 8), lambda a: center_crop(a, 1, 1)])
def test_anything_but_a_uint8_rgb_array_is_refused(function, bad):
    with pytest.raises(PictureError, match=r"wanted uint8 \(height, width, 3\)"):
        function(bad)


def test_crop_larger_than_the_picture_is_refused():
    with pytest.raises(PictureError, match="got 5x8 pixels, wanted at least 6x8"):
        center_crop(_picture(5, 8), 6, 8)


def test_empty_input_size_is_refused():
    with pytest.raises(UsageError, match="0x224"):
        PreprocessSpec(height=0)


def test_zero_standard_deviation_is_refused():
    with pytest.raises(UsageError, match=r"preprocess\.std"):
        PreprocessSpec(std=(0.5, 0.0, 0.5))
