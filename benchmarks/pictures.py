"""Pictures to time with, made here: smooth shapes with sensor-like noise, as JPEG bytes."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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
