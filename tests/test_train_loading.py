"""Training views depend on (seed, stage, epoch, picture) alone; nothing is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from training import write_pictures

from runtime.errors import PictureError
from runtime.preprocess import PreprocessSpec
from train.config import AugmentConfig
from train.data import load_split
from train.loading import EpochBatches, Key, ViewDataset, ViewPlan, batch_count, prepared_loader, view_loader
from train.transforms import random_view

PLAN = ViewPlan(seed=3, stage=1, first=(64, 64), second=(32, 32), augment=AugmentConfig())


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_split(write_pictures(tmp_path_factory.mktemp("data"), counts={"train": 5}), "train").records


def batches(records, **options):
    options = {"batch_size": 4, "epoch": 0} | options
    return list(view_loader(records, PLAN, **options))


def test_views_have_the_planned_sizes_and_labels_follow(records):
    first = batches(records)[0]
    assert first.first.shape == (4, 64, 64, 3)
    assert first.second.shape == (4, 32, 32, 3)
    assert first.first.dtype == torch.uint8
    order = next(iter(EpochBatches(len(records), 4, PLAN, 0)))
    assert first.labels.tolist() == [records[key.index].label for key in order]


def test_every_picture_comes_once_an_epoch_and_the_last_batch_is_smaller():
    keys = [key for batch in EpochBatches(10, 4, PLAN, epoch=2) for key in batch]
    assert Counter(key.index for key in keys) == Counter(range(10))
    assert [len(batch) for batch in EpochBatches(10, 4, PLAN, epoch=2)] == [4, 4, 2]
    assert batch_count(10, 4) == len(EpochBatches(10, 4, PLAN, epoch=2)) == 3


def test_epochs_and_stages_draw_differently():
    def order(plan, epoch):
        return [key.index for batch in EpochBatches(50, 50, plan, epoch) for key in batch]

    other_stage = ViewPlan(3, 2, (64, 64), (32, 32), AugmentConfig())
    assert order(PLAN, 0) == order(PLAN, 0)
    assert order(PLAN, 0) != order(PLAN, 1)
    assert order(PLAN, 0) != order(other_stage, 0)


def test_seed_of_the_views_gives_the_views_and_not_their_order(records):
    own, shared = (replace(PLAN, seed=seed, view_seed=view_seed) for seed, view_seed in ((3, None), (8, 3)))
    for index in range(len(records)):
        pairs = zip(ViewDataset(records, own)[Key(1, index)], ViewDataset(records, shared)[Key(1, index)], strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    orders = [list(EpochBatches(50, 50, plan, 0)) for plan in (own, shared, replace(PLAN, seed=8))]
    assert orders[0] != orders[1] == orders[2]


def test_balanced_classes_take_turns_and_the_rarer_one_comes_again():
    labels = [0, 0, 0, 0, 0, 1, 0, 1, 0]  # 7 real, 2 fake
    batches = list(EpochBatches(9, 4, PLAN, epoch=1, balance=labels))
    indices = [key.index for batch in batches for key in batch]
    assert [labels[index] for index in indices] == [0, 1] * 7
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    assert Counter(index for index in indices if not labels[index]) == Counter([0, 1, 2, 3, 4, 6, 8])
    assert sorted(Counter(index for index in indices if labels[index]).values()) == [3, 4]
    assert indices != [key.index for batch in EpochBatches(9, 4, PLAN, epoch=2, balance=labels) for key in batch]
    rest = list(EpochBatches(9, 4, PLAN, epoch=1, start=2, balance=labels))
    assert rest == batches[2:]


@pytest.mark.parametrize("options", [{"workers": 2}, {"start": 1}], ids=["two workers", "from the second batch on"])
def test_same_batches_come_out_however_they_are_loaded(records, options):
    expected = batches(records)[options.get("start", 0) :]
    found = batches(records, **options)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_loading_leaves_the_runs_random_numbers_alone(records):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(records)
    assert torch.equal(torch.get_rng_state(), before)


def test_broken_picture_stops_the_loader(records, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    broken = [type(records[0])(path, 0, "g", "g", "o", None)]
    with pytest.raises(PictureError, match=r"broken\.png"):
        batches(broken)
    with pytest.raises(PictureError, match=r"broken\.png"):
        list(prepared_loader(broken, PreprocessSpec(), batch_size=1))


def test_view_is_a_crop_of_the_picture_without_resampling():
    rgb = np.arange(20 * 30 * 3, dtype=np.uint16).astype(np.uint8).reshape(20, 30, 3)
    view = random_view(rgb, (8, 9), AugmentConfig(flip=False), np.random.default_rng(0)).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(rgb, (8, 9, 3)).reshape(-1, 8, 9, 3)
    assert any(np.array_equal(view, window) for window in windows)


def test_flip_jitter_and_grey_are_drawn_as_configured():
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def views(**augment):
        config = AugmentConfig(**({"flip": False} | augment))
        return [random_view(rgb, (16, 16), config, np.random.default_rng(seed)).numpy() for seed in range(40)]

    flipped = [np.array_equal(view, rgb[:, ::-1]) for view in views(flip=True)]
    assert 8 < sum(flipped) < 32
    assert all(np.array_equal(view, rgb) for view in views())
    assert any(not np.array_equal(view, rgb) for view in views(colour_jitter=0.4))
    assert all(np.ptp(view.astype(int), axis=2).max() == 0 for view in views(grey=1.0))


def test_picture_smaller_than_the_crop_is_mirrored_outwards():
    rgb = np.full((1, 1, 3), 7, dtype=np.uint8)
    view = random_view(rgb, (32, 32), AugmentConfig(), np.random.default_rng(0))
    assert view.shape == (32, 32, 3)
    assert bool((view == 7).all())


def test_view_of_a_picture_of_exactly_its_size_leaves_the_decoders_array_alone():
    rgb = np.zeros((8, 9, 3), dtype=np.uint8)
    rgb.setflags(write=False)
    view = random_view(rgb, (8, 9), AugmentConfig(flip=False), np.random.default_rng(0))
    view += 1
    assert rgb.max() == 0
