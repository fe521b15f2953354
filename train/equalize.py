"""Both classes re-encoded and cropped alike, so that a label cannot be read off file formats, sizes or qualities.

Every picture is stored as JPEG, its middle is cut out at one size, and that is stored as JPEG again, at two qualities
that are drawn for the picture, whatever its label and format. Once would not do: fakes are mostly lossless files, and
would have passed one quantisation on one block grid where cameras' pictures have passed two on two grids. The draws
are keyed by the file's content, so they are the same in every epoch, process and layout.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from train.errors import ConfigError, DataError

SUBSAMPLING = "4:2:0"
# Largest JPEG block with 4:2:0 chroma: what is cut at its multiples keeps the grid of the whole picture.
BLOCK = 16


@dataclass(frozen=True)
class EqualizeConfig:
    """Equal treatment of both classes before anything else."""

    enabled: Annotated[bool, tyro.conf.arg(name="equalize")] = False
    """Crop and re-encode every picture alike, real or fake."""
    size: Annotated[int, tyro.conf.arg(name="equalize-size")] = 224
    """Side in pixels of the centre crop; no picture may be smaller, since padding would tell the classes apart."""
    quality: Annotated[tuple[int, int], tyro.conf.arg(name="equalize-quality")] = (70, 95)
    """Smallest and largest JPEG quality; two are drawn for each picture, before and after the crop."""

    def describe(self) -> str:
        """What is done, in words."""
        if not self.enabled:
            return "pictures as they are stored"
        low, high = self.quality
        return f"both classes alike: JPEG, centre {self.size} px, JPEG, at drawn qualities of {low} to {high}"


def check_equalize(config: EqualizeConfig) -> None:
    """Refuse values that do not make sense.

    Raises:
        ConfigError: naming the option.
    """
    low, high = config.quality
    if config.size < 1:
        raise ConfigError(
            "--equalize-size", got=str(config.size), wanted="1 or more pixels", remedy="change this option"
        )
    if not 1 <= low <= high <= 100:
        raise ConfigError(
            "--equalize-quality",
            got=f"{low} {high}",
            wanted="two qualities from 1 to 100, the smaller first",
            remedy="change this option",
        )


def equalized_jpeg(rgb: NDArray[np.uint8], config: EqualizeConfig, *, key: str, name: str) -> bytes:
    """The file that takes a picture's place: its middle as JPEG.

    Args:
        rgb: (h, w, 3) uint8, decoded.
        config: size and qualities.
        key: hex digest of the file's content; decides the draws.
        name: of the picture, for errors.

    Raises:
        DataError: the picture is smaller than the crop.
    """
    if min(rgb.shape[:2]) < config.size:
        raise DataError(
            name,
            got=f"{rgb.shape[1]}x{rgb.shape[0]} pixels",
            wanted=f"at least {config.size} on both sides for --equalize-size {config.size}",
            remedy=f"pass --equalize-size {min(rgb.shape[:2])}, or leave the picture out",
        )
    rng = np.random.default_rng(int(key, 16))
    whole, final = (int(q) for q in rng.integers(config.quality[0], config.quality[1] + 1, size=2))
    rows, columns = (_middle(side, config.size) for side in rgb.shape[:2])
    blocks = jpeg_bytes(rgb[rows.outer, columns.outer], whole)
    return jpeg_bytes(jpeg_pixels(blocks)[rows.inner, columns.inner], final)


class _Middle(NamedTuple):
    """Where the crop lies along one side: the blocks that it touches, and its place among them."""

    outer: slice
    inner: slice


def _middle(side: int, size: int) -> _Middle:
    start = (side - size) // 2
    first = start // BLOCK * BLOCK
    stop = -(-(start + size) // BLOCK) * BLOCK
    return _Middle(slice(first, stop), slice(start - first, start - first + size))


def jpeg_bytes(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """JPEG file of (h, w, 3) pixels with 4:2:0 chroma, quality from 1 to 100."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return buffer.getvalue()


def jpeg_pixels(data: bytes) -> NDArray[np.uint8]:
    """RGB pixels (h, w, 3) of what `jpeg_bytes` gave."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))
