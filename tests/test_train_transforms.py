"""Each augmentation does what it says, draws from the view's own generator, and leaves other configurations alone."""

from __future__ import annotations

import dataclasses
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from training import write_pictures

from train.config import AugmentConfig
from train.data import load_split
from train.loading import Key, ViewDataset, ViewPlan, view_loader
from train.transforms import random_view

PLAIN = AugmentConfig(flip=False)
SIDE = 64
NOISE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
GREY = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
ALL = AugmentConfig(blur_share=0.5, jpeg_share=0.5, rescale_share=0.5, noise_share=0.5)


def view(rgb, size=(SIDE, SIDE), seed=0, **augment):
    return random_view(rgb, size, dataclasses.replace(PLAIN, **augment), np.random.default_rng(seed)).numpy()


def stored(rgb, quality):
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())))


# Made before there were any of the shares below: pixels, and where the generator stands afterwards.
@pytest.mark.parametrize(
    ("augment", "pixels", "next_draw"),
    [
        (AugmentConfig(), "8fe522050294140b3efe2596d3c2f635cd9465aac36acef9f137c8ce051815be", 1034595557),
        (AugmentConfig(grey=0.5), "0375af06c7e998da14b31a10be64b735194717037bb37348dcf67fc7b74423dc", 263071612),
    ],
    ids=["flip", "grey"],
)
def test_views_without_these_changes_are_the_bits_they_have_always_been(augment, pixels, next_draw):
    digest, rng = hashlib.sha256(), np.random.default_rng([3, 1, 0, 5])
    for size in ((64, 64), (32, 32), (80, 100)):
        digest.update(random_view(NOISE, size, augment, rng).numpy().tobytes())
    assert digest.hexdigest() == pixels
    assert rng.integers(1 << 30) == next_draw


def high_frequencies(rgb):
    """Share of the spectrum's energy above a quarter of the sampling rate."""
    energy = np.abs(np.fft.fft2(rgb.astype(float) - rgb.mean(), axes=(0, 1))) ** 2
    rate = np.abs(np.fft.fftfreq(rgb.shape[0]))
    return energy[np.maximum.outer(rate, rate) > 0.25].sum() / energy.sum()


def test_blur_removes_high_frequencies_and_keeps_the_brightness():
    plain = view(NOISE)
    blurred = [view(NOISE, blur_share=1.0, blur_sigma=(sigma, sigma)) for sigma in (0.0, 1.0, 3.0)]
    assert np.array_equal(blurred[0], plain)
    assert high_frequencies(plain) > 0.6
    assert high_frequencies(blurred[1]) < 0.1
    assert high_frequencies(blurred[2]) < 0.03  # what is left is the jump between opposite borders
    assert blurred[2].mean() == pytest.approx(plain.mean(), abs=0.5)


def test_noise_has_the_standard_deviation_that_was_drawn():
    noisy = view(GREY, noise_share=1.0, noise_std=(8.0, 8.0)).astype(float)
    assert noisy.std() == pytest.approx(8.0, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.5)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.1
    blurred = view(GREY, noise_share=1.0, noise_std=(8.0, 8.0), blur_share=1.0, blur_sigma=(3.0, 3.0))
    assert blurred.astype(float).std() == pytest.approx(8.0, rel=0.05)  # the noise comes after the blur
    clipped = view(NOISE, noise_share=1.0, noise_std=(200.0, 200.0))
    assert (clipped == 0).mean() > 0.2
    assert (clipped == 255).mean() > 0.2


def test_jpeg_is_what_pillow_makes_of_the_view_and_comes_last():
    assert np.array_equal(view(NOISE, jpeg_share=1.0, jpeg_quality=(40, 40)), stored(view(NOISE), 40))
    others = {"blur_share": 1.0, "noise_share": 1.0, "rescale_share": 1.0, "colour_jitter": 0.2}
    both = view(NOISE, jpeg_share=1.0, jpeg_quality=(75, 75), **others)
    assert np.array_equal(both, stored(view(NOISE, **others), 75))


def test_jpeg_qualities_are_drawn_up_to_both_ends():
    crop = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    by_quality = {stored(crop, quality).tobytes(): quality for quality in (90, 91, 92)}
    drawn = [by_quality[view(crop, (32, 32), s, jpeg_share=1.0, jpeg_quality=(90, 92)).tobytes()] for s in range(40)]
    assert set(drawn) == {90, 91, 92}


def windows(rgb, size):
    return np.lib.stride_tricks.sliding_window_view(rgb, (*size, 3)).reshape(-1, *size, 3)


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.4])
def test_rescaled_view_is_a_crop_of_the_resampled_picture(factor):
    rgb, size, found = NOISE[:40, :46], (18, 19), set()
    shape = [round(side * factor) for side in (46, 40)]
    enlarged = factor > 1
    filters = {"bilinear": 2, "bicubic": 3, "lanczos": 1} | ({} if enlarged else {"box": 4})
    whole = {name: np.asarray(Image.fromarray(rgb).resize(shape, kind)) for name, kind in filters.items()}
    for seed in range(24):
        seen = view(rgb, size, seed, rescale_share=1.0, rescale_factor=(factor, factor)).astype(int)
        far = {name: np.abs(windows(picture, size) - seen).max((1, 2, 3)).min() for name, picture in whole.items()}
        nearest = min(far, key=far.get)
        # The box's corners are float32 in Pillow, which may round a grey level the other way.
        assert far[nearest] <= 1
        found.add(nearest)
    assert found == set(filters)


def test_picture_that_became_smaller_than_the_crop_is_mirrored_outwards():
    half = np.asarray(Image.fromarray(NOISE).resize((45, 35), Image.Resampling.BICUBIC))
    seen = [view(NOISE, (35, 60), seed, rescale_share=1.0, rescale_factor=(0.5, 0.5)) for seed in range(24)]
    assert all(picture.shape == (35, 60, 3) for picture in seen)
    assert any(np.abs(picture[:, 7:52].astype(int) - half).max() <= 1 for picture in seen)
    assert all(np.array_equal(picture[:, 6], picture[:, 7]) for picture in seen)
    assert view(NOISE[:1, :1], (8, 8), rescale_share=1.0, rescale_factor=(0.1, 0.1)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "augment",
    [
        {"blur_share": 0.3, "blur_sigma": (1.0, 2.0)},
        {"jpeg_share": 0.3, "jpeg_quality": (30, 50)},
        {"noise_share": 0.3, "noise_std": (5.0, 9.0)},
        {"rescale_share": 0.3, "rescale_factor": (0.5, 0.9)},
    ],
    ids=["blur", "jpeg", "noise", "rescale"],
)
def test_share_of_the_views_that_are_changed_is_the_one_asked_for(augment):
    rgb = NOISE[:40, :40]
    changed = [not np.array_equal(view(rgb, (40, 40), seed, **augment), rgb) for seed in range(200)]
    assert sum(changed) == pytest.approx(60, abs=20)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_split(write_pictures(tmp_path_factory.mktemp("data"), counts={"train": 4}, side=72), "train").records


def plan_of(augment):
    return ViewPlan(seed=3, stage=2, first=(64, 64), second=(64, 64), augment=augment)


def test_same_views_come_out_with_any_number_of_workers(records):
    loaded = [list(view_loader(records, plan_of(ALL), batch_size=3, epoch=0, workers=n)) for n in (0, 2)]
    for mine, theirs in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_real_and_fake_pictures_are_treated_alike(records):
    swapped = [dataclasses.replace(record, label=1 - record.label) for record in records]
    mine, theirs = ViewDataset(records, plan_of(ALL)), ViewDataset(swapped, plan_of(ALL))
    for key in [Key(epoch, index) for epoch in range(4) for index in range(len(records))]:
        (first, second, label), (other_first, other_second, other_label) = mine[key], theirs[key]
        assert torch.equal(first, other_first)
        assert torch.equal(second, other_second)
        assert label != other_label


def test_both_views_of_a_picture_draw_for_themselves(records):
    half = dataclasses.replace(PLAIN, noise_share=0.5, noise_std=(20.0, 20.0))
    whole = dataclasses.replace(plan_of(half), first=(72, 72), second=(72, 72))
    plain = dataclasses.replace(whole, augment=PLAIN)
    changed = set()
    for key in [Key(epoch, index) for epoch in range(8) for index in range(len(records))]:
        pairs = zip(ViewDataset(records, whole)[key][:2], ViewDataset(records, plain)[key][:2], strict=True)
        changed.add(tuple(not torch.equal(a, b) for a, b in pairs))
    assert changed == {(a, b) for a in (False, True) for b in (False, True)}
