"""Random training views of a decoded picture; every draw comes from the generator that is passed in."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from runtime.preprocess import pad_to
from train.config import AugmentConfig


def random_view(
    rgb: NDArray[np.uint8], size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Tensor:
    """Random crop of a picture, flipped, jittered and greyed as configured.

    Args:
        rgb: (h, w, 3) uint8; mirrored outwards as in `runtime.preprocess` where it is smaller than the crop.
        size: rows and columns of the crop; pixels are never resampled.
        augment: which changes are drawn.
        rng: source of every random number.

    Returns:
        (rows, columns, 3) uint8.
    """
    rows, columns = size
    padded = pad_to(rgb, rows, columns)
    top = int(rng.integers(padded.shape[0] - rows + 1))
    left = int(rng.integers(padded.shape[1] - columns + 1))
    # A copy, because a picture of exactly this size is the decoder's own array, which must not be written to.
    view = torch.from_numpy(padded[top : top + rows, left : left + columns].copy())
    return _augmented(view.permute(2, 0, 1), augment, rng).permute(1, 2, 0).contiguous()


def _augmented(view: Tensor, augment: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """`view` (3, rows, columns) uint8 after the configured changes."""
    if augment.flip and rng.random() < 0.5:
        view = F.horizontal_flip(view)
    if augment.colour_jitter > 0:
        for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
            view = adjust(view, 1.0 + float(rng.uniform(-augment.colour_jitter, augment.colour_jitter)))
    if augment.grey > 0 and rng.random() < augment.grey:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    return view
