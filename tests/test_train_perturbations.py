"""Operations on pictures: what each does, that it leaves its input alone, and that noise is keyed by content."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runtime.errors import PictureError
from train.perturbations import (
    OPERATIONS,
    THUMBNAIL_QUALITY,
    gaussian_blur,
    gaussian_noise,
    jpeg_round_trip,
    perturbed,
    rescaled,
    thumbnail_round_trip,
    webp_round_trip,
)

KEY, OTHER_KEY = "ab" * 32, "cd" * 32
STRENGTHS = {"blur": 1.0, "jpeg": 80.0, "noise": 10.0, "scale": 0.5, "webp": 80.0, "thumbnail": 16.0}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(40, 56, 3), smooth with some grain; nothing may write to it."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((56, 40), Image.Resampling.BICUBIC), dtype=np.int16)
    rgb = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    rgb.flags.writeable = False
    return rgb


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_changes_the_picture_in_the_same_way_each_time(picture: np.ndarray, operation: str) -> None:
    before = picture.copy()
    once, twice = (perturbed(picture, operation, STRENGTHS[operation], key=KEY) for _ in range(2))
    assert once.dtype == np.uint8
    assert once.shape == ((20, 28, 3) if operation == "scale" else picture.shape)
    assert np.array_equal(once, twice)
    assert once.shape != picture.shape or rms(once, picture) > 1
    assert np.array_equal(picture, before)


@pytest.mark.parametrize(("operation", "strength"), [("blur", 0.0), ("noise", 0.0), ("scale", 1.0)])
def test_identity_gives_back_the_picture_itself(picture: np.ndarray, operation: str, strength: float) -> None:
    assert perturbed(picture, operation, strength, key=KEY) is picture


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_blur_spreads_a_point_as_a_gaussian_of_this_width(sigma: float) -> None:
    point = np.zeros((41, 41, 3), dtype=np.uint8)
    point[20, 20] = 255
    x = np.arange(41) - 20
    bell = np.exp(-0.5 * (x / sigma) ** 2)
    expected = 255 * np.outer(bell, bell) / bell.sum() ** 2
    assert np.abs(gaussian_blur(point, sigma)[..., 1] - expected).max() < 1.0


def test_blur_leaves_an_even_picture_as_it_is_up_to_its_borders() -> None:
    even = np.full((9, 12, 3), (10, 128, 250), dtype=np.uint8)
    assert np.array_equal(gaussian_blur(even, 3.0), even)


def test_noise_has_the_stated_strength() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    change = gaussian_noise(grey, 10.0, np.random.default_rng(0)).astype(np.float64) - 128
    assert change.std() == pytest.approx(10.0, rel=0.02)
    assert abs(change.mean()) < 0.2
    assert abs(np.corrcoef(change[..., 0].ravel(), change[..., 1].ravel())[0, 1]) < 0.03


def test_noise_is_one_field_for_each_content_and_seed_at_every_strength() -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)

    def field(strength: float, key: str, seed: int = 0) -> np.ndarray:
        return (perturbed(grey, "noise", strength, key=key, seed=seed).astype(np.float64) - 128) / strength

    assert np.abs(field(10.0, KEY) - field(20.0, KEY)).max() < 0.5 / 10 + 0.5 / 20 + 1e-9  # rounding alone
    assert rms(field(10.0, KEY), field(10.0, OTHER_KEY)) > 1
    assert rms(field(10.0, KEY), field(10.0, KEY, seed=1)) > 1


@pytest.mark.parametrize("round_trip", [jpeg_round_trip, webp_round_trip])
def test_lower_qualities_lose_more(picture: np.ndarray, round_trip) -> None:
    losses = [rms(round_trip(picture, quality), picture) for quality in (95, 60, 30)]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_jpeg_halves_the_resolution_of_colour() -> None:
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2, 0] = 200  # red in every other column; its brightness survives, its colour is shared by two
    columns = jpeg_round_trip(stripes, 100).astype(np.float64).mean(axis=0)
    red_over_blue = columns[:, 0] - columns[:, 2]
    assert red_over_blue[1::2].mean() > 40


@pytest.mark.parametrize(
    ("factor", "shape"), [(0.5, (20, 28, 3)), (0.2, (8, 11, 3)), (1.5, (60, 84, 3)), (0.01, (1, 1, 3))]
)
def test_scaling_gives_the_stated_size(picture: np.ndarray, factor: float, shape: tuple[int, ...]) -> None:
    scaled = rescaled(picture, factor)
    assert scaled.shape == shape
    assert scaled.mean() == pytest.approx(picture.mean(), abs=3)


def test_scaling_down_does_not_alias() -> None:
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    middle = rescaled(stripes, 0.25)[2:-2, 2:-2]
    assert np.abs(middle.astype(int) - 127).max() < 4


def test_thumbnail_comes_back_at_its_size_without_what_the_preview_could_not_hold(picture: np.ndarray) -> None:
    small, large = (rms(thumbnail_round_trip(picture, side), picture) for side in (14, 28))
    assert small > large > rms(jpeg_round_trip(picture, THUMBNAIL_QUALITY), picture)


def test_picture_no_larger_than_the_preview_is_stored_as_jpeg_alone(picture: np.ndarray) -> None:
    alone = jpeg_round_trip(picture, THUMBNAIL_QUALITY)
    for side in (56, 200):
        assert np.array_equal(thumbnail_round_trip(picture, side), alone)


def test_picture_too_large_for_webp_is_refused() -> None:
    with pytest.raises(PictureError, match="WebP: got 16384x1 pixels, wanted at most 16383"):
        webp_round_trip(np.zeros((1, 16384, 3), dtype=np.uint8), 80)
