"""The networks that rebuild pictures: they learn, they repeat, and each leaves its up-sampler's trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.resynthesis import (
    UPSAMPLERS,
    ResynthesisConfig,
    ResynthesisNet,
    one_thread_each,
    psnr_db,
    resynthesize,
    train_resynthesis,
)

TINY = ResynthesisConfig(steps=30, batch=2, patch_px=32, width=6, code_channels=8)


def smooth_pictures(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """Colour gradients with random directions, (N, size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    slopes = rng.uniform(-1, 1, (count, 3, 2))
    planes = 0.5 + 0.4 * (slopes[..., 0, None, None] * x + slopes[..., 1, None, None] * y)
    return (planes.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
def test_rebuilt_pictures_keep_shape_type_and_most_of_the_content(upsampler: str) -> None:
    pictures = smooth_pictures(3, size=48)
    config = ResynthesisConfig(steps=150, batch=4, patch_px=32, width=12, code_channels=8)
    with one_thread_each():
        untrained = resynthesize(ResynthesisNet(upsampler, config).to(memory_format=torch.channels_last), pictures)
        rebuilt = resynthesize(train_resynthesis(upsampler, smooth_pictures(4), config), pictures)
    assert rebuilt.shape == pictures.shape
    assert rebuilt.dtype == np.uint8
    assert psnr_db(pictures, rebuilt) > max(18.0, psnr_db(pictures, untrained) + 5.0)


def test_training_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    photographs = smooth_pictures(2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with one_thread_each():
        first, second = (train_resynthesis("pixel_shuffle", photographs, TINY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_another_seed_gives_another_network() -> None:
    with one_thread_each():
        first = train_resynthesis("nearest_conv", smooth_pictures(2), TINY)
        other = train_resynthesis("nearest_conv", smooth_pictures(2), ResynthesisConfig(**{**vars(TINY), "seed": 1}))
    assert not torch.equal(first.encoder[0].weight, other.encoder[0].weight)


def test_every_step_is_reported() -> None:
    steps: list[int] = []
    train_resynthesis("nearest_conv", smooth_pictures(1), TINY, report=lambda step, loss: steps.append(step))
    assert steps == list(range(1, TINY.steps + 1))


@pytest.mark.parametrize("upsampler", ["transposed_conv", "pixel_shuffle"])
def test_upsampler_leaves_its_grid_on_an_even_picture(upsampler: str) -> None:
    torch.manual_seed(0)
    net = ResynthesisNet(upsampler, TINY).to(memory_format=torch.channels_last)
    with torch.no_grad():
        rebuilt = net(torch.zeros(1, 3, 64, 64))[0, :, 16:48, 16:48]
    assert float((rebuilt[:, :-4] - rebuilt[:, 4:]).abs().max()) < 2e-4  # period: the two strides
    assert float((rebuilt[:, :-1] - rebuilt[:, 1:]).abs().max()) > 5e-3


def test_border_shows_nothing_that_the_middle_does_not() -> None:
    even = np.full((1, 64, 64, 3), 230, np.uint8)
    with one_thread_each():
        rebuilt = resynthesize(train_resynthesis("transposed_conv", smooth_pictures(2), TINY), even)[0]
    corner, middle = rebuilt[:4, :4].astype(int), rebuilt[28:32, 28:32]
    assert np.abs(corner - middle).max() <= 1  # convolution algorithms round differently at the edges


def test_threads_are_restored_after_an_error() -> None:
    before, inside = torch.get_num_threads(), []

    def fail() -> None:
        with one_thread_each():
            inside.append(torch.get_num_threads())
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert (inside, torch.get_num_threads()) == ([1], before)


def test_psnr_of_a_known_error() -> None:
    pictures = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr_db(pictures, pictures + 5) == pytest.approx(20 * np.log10(255 / 5))


def test_unknown_upsampler_is_refused() -> None:
    with pytest.raises(ValueError, match="upsampler must be one of transposed_conv"):
        ResynthesisNet("bilinear", TINY)
