"""Near duplicates: re-encoding, rescaling and brightness are seen through, other pictures are not taken for one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import train.near_duplicates as near_duplicates
from train.near_duplicates import near_pairs, thumbnail_of


def scene(seed: int, side: int = 160) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def jpeg(rgb: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())))


CHANGES = {
    "JPEG": lambda rgb: jpeg(rgb, 40),
    "half the size": lambda rgb: np.asarray(Image.fromarray(rgb).resize((80, 80))),
    "thumbnail and back": lambda rgb: np.asarray(Image.fromarray(rgb).resize((40, 40)).resize((160, 160))),
    "brighter": lambda rgb: np.clip(rgb.astype(int) + 20, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copy_is_found_and_no_other_picture(change: str) -> None:
    first = [thumbnail_of(scene(seed)) for seed in range(30)]
    second = [thumbnail_of(CHANGES[change](scene(seed))) for seed in range(20, 40)]
    assert [(i, j) for i, j, _ in near_pairs(first, second)] == [(20 + k, k) for k in range(10)]


def test_blocks_give_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = [thumbnail_of(scene(seed % 7)) for seed in range(20)]
    expected = near_pairs(thumbnails, thumbnails[:9])
    monkeypatch.setattr(near_duplicates, "BLOCK", 4)
    assert sorted(near_pairs(thumbnails, thumbnails[:9])) == sorted(expected)
    assert len(expected) == sum(i % 7 == j % 7 for i in range(20) for j in range(9))


def test_distance_counts_the_differing_bits() -> None:
    one = np.tile(np.arange(17, dtype=np.uint8), (16, 1))
    other = one.copy()
    other[3, 5] = 200  # larger than its left neighbour as before, but its right one is smaller now
    assert near_pairs([one], [one]) == [(0, 0, 0)]
    assert near_pairs([one], [other]) == [(0, 0, 1)]


def test_shadings_of_one_direction_and_another_strength_are_told_apart() -> None:
    weak = np.tile(np.arange(17, dtype=np.uint8), (16, 1))
    assert near_pairs([weak], [weak * 15]) == []


def test_empty_lists_have_no_pairs() -> None:
    assert near_pairs([], [thumbnail_of(scene(0))]) == []
