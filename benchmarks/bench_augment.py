"""One training view of a photograph: cropped and flipped alone, and with each further change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.pictures import photograph
from train.config import AugmentConfig
from train.transforms import random_view

HEIGHT_PX, WIDTH_PX = 375, 500  # the commonest size in ImageNet, where the method's real pictures are from
SIDE_PX = 224
CHANGES = {
    "crop and flip": {},
    "with blur": {"blur_share": 1.0},
    "with noise": {"noise_share": 1.0},
    "with JPEG": {"jpeg_share": 1.0},
    "resampled": {"rescale_share": 1.0},
}


@pytest.mark.parametrize("name", CHANGES)
def bench_augment(benchmark, name):
    rgb, augment = photograph(HEIGHT_PX, WIDTH_PX), AugmentConfig(**CHANGES[name])
    drawn = iter(range(1_000_000))

    def view():
        # Another view each time: sizes, strengths and qualities are drawn.
        return random_view(rgb, (SIDE_PX, SIDE_PX), augment, np.random.default_rng(next(drawn)))

    assert view().shape == (SIDE_PX, SIDE_PX, 3)
    same = dataclasses.replace(augment, **dict.fromkeys(CHANGES[name], 0.0))
    plain, changed = (random_view(rgb, (SIDE_PX, SIDE_PX), a, np.random.default_rng(1)) for a in (same, augment))
    assert bool((plain != changed).any()) == bool(CHANGES[name])
    benchmark.group = f"one training view, {SIDE_PX} px of {WIDTH_PX}x{HEIGHT_PX}"
    benchmark.name = name
    benchmark.extra_info["baseline"] = not CHANGES[name]
    benchmark.pedantic(view, rounds=100, warmup_rounds=5)
