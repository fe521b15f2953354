"""Random training views of a decoded picture; every draw comes from the generator that is passed in.

What happens to a view follows the life of a picture: it is resampled, cropped, and mirrored or recoloured; blurred as
by a lens, given a sensor's noise, which a blur after it would take away; and stored as JPEG last, since anything after
it would break up its blocks. All but the resampling work on the crop alone, which is a small part of the picture.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from runtime.preprocess import pad_to
from train.config import AugmentConfig
from train.equalize import jpeg_bytes, jpeg_pixels

Pixels = NDArray[np.uint8]
Resampling = Image.Resampling
# What picture software offers, for a smaller and for a larger picture. There is no area to average where a picture
# grows: there OpenCV's INTER_AREA is bilinear.
RESAMPLINGS = (
    (Resampling.BILINEAR, Resampling.BILINEAR),
    (Resampling.BICUBIC, Resampling.BICUBIC),
    (Resampling.LANCZOS, Resampling.LANCZOS),
    (Resampling.BOX, Resampling.BILINEAR),
)


def random_view(rgb: Pixels, size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Random crop of a picture, changed as configured.

    Args:
        rgb: (h, w, 3) uint8; mirrored outwards as in `runtime.preprocess` where it is smaller than the crop.
        size: rows and columns of the crop; without `rescale_share`, pixels are never resampled.
        augment: which changes are drawn.
        rng: source of every random number; what has a share of 0 draws none.

    Returns:
        (rows, columns, 3) uint8.
    """
    crop = _rescaled_crop(rgb, size, augment, rng) if _drawn(augment.rescale_share, rng) else _crop(rgb, size, rng)
    view = _recoloured(torch.from_numpy(crop).permute(2, 0, 1), augment, rng).permute(1, 2, 0).contiguous()
    return torch.from_numpy(_degraded(view.numpy(), augment, rng))


def _drawn(share: float, rng: np.random.Generator) -> bool:
    return share > 0 and rng.random() < share


def _corner(height: int, width: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop of a picture that is at least as large."""
    return int(rng.integers(height - size[0] + 1)), int(rng.integers(width - size[1] + 1))


def _crop(rgb: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    rows, columns = size
    padded = pad_to(rgb, rows, columns)
    top, left = _corner(*padded.shape[:2], size, rng)
    # A copy, because a picture of exactly this size is the decoder's own array, which must not be written to.
    return padded[top : top + rows, left : left + columns].copy()


def _rescaled_crop(rgb: Pixels, size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """Crop of the picture after it was resampled; of what is resampled, only the crop is computed."""
    factor = rng.uniform(*augment.rescale_factor)
    smaller, larger = RESAMPLINGS[rng.integers(len(RESAMPLINGS))]
    height, width = (max(1, round(side * factor)) for side in rgb.shape[:2])
    rows, columns = min(size[0], height), min(size[1], width)
    top, left = _corner(height, width, (rows, columns), rng)
    down, across = rgb.shape[0] / height, rgb.shape[1] / width
    crop = Image.fromarray(rgb).resize(
        (columns, rows),
        smaller if factor < 1 else larger,
        # The filter reads beyond the box where the picture goes on, so this is a part of the whole resampled picture.
        box=(
            left * across,
            top * down,
            min((left + columns) * across, rgb.shape[1]),
            min((top + rows) * down, rgb.shape[0]),
        ),
    )
    return np.ascontiguousarray(pad_to(np.array(crop), *size))


def _recoloured(view: Tensor, augment: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """`view` (3, rows, columns) uint8, flipped, jittered and greyed."""
    if augment.flip and rng.random() < 0.5:
        view = F.horizontal_flip(view)
    if augment.colour_jitter > 0:
        for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
            view = adjust(view, 1.0 + float(rng.uniform(-augment.colour_jitter, augment.colour_jitter)))
    if _drawn(augment.grey, rng):
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    return view


def _degraded(view: Pixels, augment: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """`view` (rows, columns, 3) blurred, with noise and as JPEG."""
    if _drawn(augment.blur_share, rng):
        sigma = rng.uniform(*augment.blur_sigma)
        view = _rounded(gaussian_filter(view.astype(np.float32), (sigma, sigma, 0)))
    if _drawn(augment.noise_share, rng):
        std = np.float32(rng.uniform(*augment.noise_std))
        view = _rounded(view + std * rng.standard_normal(view.shape, np.float32))
    if _drawn(augment.jpeg_share, rng):
        low, high = augment.jpeg_quality
        view = jpeg_pixels(jpeg_bytes(view, int(rng.integers(low, high + 1)))).copy()
    return view


def _rounded(values: NDArray[np.float32]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)
