"""Pictures to time and to train with, made here: smooth shapes with sensor-like noise, and a generator's traces."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# What stands for a generator in the pictures of `write_pictures`.
GENERATOR = "halved"


def photograph(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: blurred colour fields plus noise, which compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    fields = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = rng.normal(0, 6, (height, width, 3)).astype(np.float32)
    return np.clip(fields + noise, 0, 255).astype(np.uint8)


def jpeg_bytes(rgb: NDArray[np.uint8], *, quality: int = 92) -> bytes:
    """A JPEG file of the picture, 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_pictures(root: Path, *, counts: dict[str, int], side: int = 176, seed: int = 0) -> Path:
    """Noise with structure as "real"; the same at half resolution and half as bright as "fake".

    The brightness is there so that an encoder with random weights can tell the two apart after a few steps.

    Args:
        root: folder to make `<split>/halved/{0_real,1_fake}/` in.
        counts: pictures of each class in each split.
        side: of the square pictures, in pixels.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for index in range(count):
            coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            base = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            real = np.clip(base + rng.normal(0, 24, base.shape), 0, 255).astype(np.uint8)
            small = Image.fromarray(real).resize((side // 2, side // 2), Image.Resampling.BOX)
            fake = np.asarray(small.resize((side, side), Image.Resampling.NEAREST)) // 2
            for folder, pixels in (("0_real", real), ("1_fake", fake)):
                path = root / split / GENERATOR / folder / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root
