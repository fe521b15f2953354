"""The preprocessing contract, once: training, export, verification and serving all use this code.

A picture is padded symmetrically when it is smaller than the model's input, then cropped at its centre. It is
never resampled, because resampling rewrites the very traces that the detector reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import PictureError, UsageError

# A small picture is padded to the model's input, so a manifest says what memory it takes: 50 MB at this size.
MAX_SIDE = 4096


class Part(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """View (height, width, 3) of this part of a picture (h, w, 3)."""
        return rgb[self.top : self.top + self.height, self.left : self.left + self.width]

    def within(self, outer: Part) -> Part:
        """The same rectangle, with its place counted from the corner of a part that holds it."""
        return self._replace(top=self.top - outer.top, left=self.left - outer.left)


@dataclass(frozen=True)
class PreprocessSpec:
    """What is done to a picture before the graph sees it.

    Args:
        height: rows of the model's input.
        width: columns of the model's input.
        crop: which part is kept.
        pad: how a smaller picture is filled up.
        color: order of the channels.
        mean: subtracted inside the graph, per channel, for values scaled to 0..1; for information.
        std: divided by inside the graph, per channel, for values scaled to 0..1; for information.
    """

    height: int = 224
    width: int = 224
    crop: Literal["center"] = "center"
    pad: Literal["symmetric"] = "symmetric"
    color: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise UsageError(
                "preprocess",
                got=f"an input of {self.height}x{self.width}",
                wanted=f"height and width of 1 to {MAX_SIDE}",
                remedy="use the encoder's input size",
            )
        if not all(value > 0 for value in self.std):
            raise UsageError(
                "preprocess.std",
                got=str(self.std),
                wanted="positive values",
                remedy="use the encoder's own standard deviations",
            )


def prepare(rgb: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Model input (H, W, 3) uint8, C-contiguous: the picture padded when it is smaller, then centre cropped.

    Args:
        rgb: (h, w, 3) uint8 picture of any size from 1x1.
        spec: wanted size; its mean and std are not applied, the graph does that.

    Raises:
        PictureError: `rgb` is not uint8 (h, w, 3), or it is empty.
    """
    # Cropping first touches only what is kept; no axis is both cropped and padded: same pixels.
    cropped = center_crop(rgb, min(spec.height, rgb.shape[0]), min(spec.width, rgb.shape[1]))
    return np.ascontiguousarray(pad_to(cropped, spec.height, spec.width))


def pad_to(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Picture of at least (height, width), mirrored outwards including its border, evenly on both sides.

    An odd remainder goes to the bottom and to the right. A picture that is large enough comes back as it is.

    Args:
        rgb: (h, w, 3) uint8, from 1x1; it is mirrored as often as needed.
        height: wanted rows at least.
        width: wanted columns at least.

    Raises:
        PictureError: `rgb` is not uint8 (h, w, 3), or it is empty.
    """
    require_rgb(rgb)
    rows, columns = max(0, height - rgb.shape[0]), max(0, width - rgb.shape[1])
    if rows == 0 and columns == 0:
        return rgb
    # Mirroring with the border has period 2h, so one index per row says it for any amount of padding.
    return rgb[_mirrored(rgb.shape[0], rows)[:, None], _mirrored(rgb.shape[1], columns)[None, :]]


def center_crop(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """View (height, width, 3) of the picture's middle; an odd remainder is cut at the bottom and the right.

    Args:
        rgb: (h, w, 3) uint8 with h >= height and w >= width.
        height: rows to keep.
        width: columns to keep.

    Raises:
        PictureError: the picture is smaller than the crop, is not uint8 (h, w, 3), or is empty.
    """
    require_rgb(rgb)
    if rgb.shape[0] < height or rgb.shape[1] < width:
        raise PictureError(
            "picture",
            got=f"{rgb.shape[0]}x{rgb.shape[1]} pixels",
            wanted=f"at least {height}x{width} for this crop",
            remedy="pad it first with pad_to, or use prepare, which does both",
        )
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return rgb[top : top + height, left : left + width]


def require_rgb(rgb: object) -> None:
    """Nothing for a non-empty uint8 (h, w, 3) array, an error for anything else.

    Raises:
        PictureError: the array has another type or shape.
    """
    if not isinstance(rgb, np.ndarray):
        got = f"a {type(rgb).__name__}"
    elif rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        got = f"{rgb.dtype} {rgb.shape}"
    else:
        return
    raise PictureError(
        "picture array",
        got=got,
        wanted="uint8 (height, width, 3), height and width at least 1",
        remedy="pass raw RGB pixels, 0 to 255, channels last; repeat a grey channel three times",
    )


def _mirrored(size: int, extra: int) -> NDArray[np.intp]:
    """Source index of each of size + extra rows, for mirroring that repeats the border row."""
    index = np.arange(-(extra // 2), size + extra - extra // 2) % (2 * size)
    return np.where(index < size, index, 2 * size - 1 - index)
