"""A picture as it is, re-encoded and rescaled: the crops of each that the model looks at.

A view of a changed picture is computed from the pixels around it alone: JPEG works in blocks that do not know of one
another but for the smoothing of chroma, and a resampling filter looks a few pixels far.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.decode import DecodedPart, PictureSource, decode_part, decode_picture
from runtime.preprocess import Part, PreprocessSpec, prepare
from runtime.views import Views, bounding_part, most_views, part_at, view_anchors

# An MCU of 4:2:0, which Pillow writes; more than the reach of bicubic resampling at half the size, 4 px.
_MARGIN = 16


class Change(Protocol):
    """Something that happens to a picture."""

    @property
    def name(self) -> str:
        """What it is, for people and for JSON."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the changed picture."""

    def needs(self, part: Part, height: int, width: int) -> Part:
        """What of a picture of that height and width a part of the changed one is made from."""

    def pixels(self, part: Part, decoded: DecodedPart) -> NDArray[np.uint8]:
        """RGB pixels of a part of the changed picture; `decoded` holds what it needs."""


@dataclass(frozen=True)
class Unchanged:
    """The picture as it is."""

    name: str = "unchanged"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The same."""
        return height, width

    def needs(self, part: Part, height: int, width: int) -> Part:
        """The part itself."""
        return part

    def pixels(self, part: Part, decoded: DecodedPart) -> NDArray[np.uint8]:
        """The part of the picture."""
        return part.within(decoded.part).of(decoded.rgb)


@dataclass(frozen=True)
class Reencoded:
    """The picture saved once more as a JPEG file, 4:2:0.

    Args:
        quality: of libjpeg's scale, 1 to 95.
    """

    quality: int

    @property
    def name(self) -> str:
        """For example "jpeg 85"."""
        return f"jpeg {self.quality}"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The same."""
        return height, width

    def needs(self, part: Part, height: int, width: int) -> Part:
        """Whole MCUs of the picture, one more than the part touches on each side."""
        top, left = (max(0, start // _MARGIN - 1) * _MARGIN for start in (part.top, part.left))
        bottom, right = (
            min(size, (math.ceil(end / _MARGIN) + 1) * _MARGIN)
            for end, size in ((part.top + part.height, height), (part.left + part.width, width))
        )
        return Part(top, left, bottom - top, right - left)

    def pixels(self, part: Part, decoded: DecodedPart) -> NDArray[np.uint8]:
        """The part of the decoded JPEG file."""
        around = self.needs(part, decoded.height, decoded.width)
        file = io.BytesIO()
        Image.fromarray(around.within(decoded.part).of(decoded.rgb)).save(file, "JPEG", quality=self.quality)
        return part.within(around).of(decode_picture(file.getvalue()))


@dataclass(frozen=True)
class Rescaled:
    """The picture resampled to another size with a bicubic filter.

    Args:
        factor: new length by old length of each side, 0.5 or more.
    """

    factor: float

    @property
    def name(self) -> str:
        """For example "scale 0.75"."""
        return f"scale {self.factor:g}"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rounded, and at least 1."""
        return max(1, round(height * self.factor)), max(1, round(width * self.factor))

    def needs(self, part: Part, height: int, width: int) -> Part:
        """The pixels that the filter reaches."""
        left, upper, right, lower = self._box(part, height, width)
        top, start = max(0, int(upper) - _MARGIN), max(0, int(left) - _MARGIN)
        return Part(
            top, start, min(height, math.ceil(lower) + _MARGIN) - top, min(width, math.ceil(right) + _MARGIN) - start
        )

    def pixels(self, part: Part, decoded: DecodedPart) -> NDArray[np.uint8]:
        """The part of the picture resampled along its rows and then along its columns.

        A pixel may be off by two levels from resampling the whole, whose positions are rounded elsewhere.
        """
        around = self.needs(part, decoded.height, decoded.width)
        left, upper, right, lower = self._box(part, decoded.height, decoded.width)
        columns = (left - around.left, 0, min(right - around.left, around.width), around.height)
        rows = (0, upper - around.top, part.width, min(lower - around.top, around.height))
        image = Image.fromarray(around.within(decoded.part).of(decoded.rgb))
        # One call would choose the order by the sizes; it matters, because values are cut to 0..255 in between.
        along_rows = image.resize((part.width, around.height), Image.Resampling.BICUBIC, box=columns)
        return np.asarray(along_rows.resize((part.width, part.height), Image.Resampling.BICUBIC, box=rows))

    def _box(self, part: Part, height: int, width: int) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge of a part of the changed picture, in pixels of the picture."""
        rows, columns = self.size(height, width)
        down, across = height / rows, width / columns
        return (
            part.left * across,
            part.top * down,
            (part.left + part.width) * across,
            (part.top + part.height) * down,
        )


UNCHANGED: tuple[Change, ...] = (Unchanged(),)
# What messengers and social networks do to a picture, from mild to common; the picture as it is comes first.
CHANGES: tuple[Change, ...] = (
    *UNCHANGED,
    *(Reencoded(quality) for quality in (95, 85, 75)),
    *(Rescaled(factor) for factor in (0.75, 1.25)),
)


class Looks(NamedTuple):
    """How a picture is looked at: which views, of the picture under which changes."""

    views: Views
    changes: tuple[Change, ...]

    @property
    def most_crops(self) -> int:
        """Crops of a picture that is large enough to have all views."""
        return most_views(self.views) * len(self.changes)


def picture_crops(
    source: PictureSource, spec: PreprocessSpec, looks: Looks, *, max_pixels: int
) -> list[NDArray[np.uint8]]:
    """Model inputs (H, W, 3) uint8 of a picture: for each change, the same number of views, the middle one first.

    Args:
        source: as for `runtime.decode.decode_picture`.
        spec: of the model.
        looks: which ones.
        max_pixels: largest picture that is accepted, height times width.

    Raises:
        PictureError: as for `runtime.decode.decode_picture`.
    """

    def placed(height: int, width: int) -> list[tuple[Change, Part]]:
        anchors = view_anchors(height, width, spec, looks.views)
        return [
            (change, part_at(anchor, *change.size(height, width), spec))
            for change in looks.changes
            for anchor in anchors
        ]

    def needed(height: int, width: int) -> Part:
        return bounding_part([change.needs(part, height, width) for change, part in placed(height, width)])

    decoded = decode_part(source, needed, max_pixels=max_pixels)
    return [prepare(change.pixels(part, decoded), spec) for change, part in placed(decoded.height, decoded.width)]
