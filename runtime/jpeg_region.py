"""A part of a JPEG file without the rest: the pixels that Pillow gives for the whole file, at a fraction of the time.

libjpeg-turbo leaves out the inverse transform of what is not wanted. It is asked only where the answer is known to be
Pillow's: a complete file, in one of the plain forms, that it reads without a warning. Everything else is decoded in
full by Pillow, which then says what is wrong with it.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray
from PIL import features

from runtime.preprocess import Part
from runtime.turbojpeg import find_turbojpeg

# The widest MCU (4:1:1). A region is widened by one and begins at one: smoothing between chroma samples looks across
# its border, and the library wants whole MCUs on the left.
_MCU = 32

# T.81, table B.1: after a scan's data, what is neither a stuffed byte, a restart nor a fill byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all with Huffman codes
_COEFFICIENTS = 64


def decode_jpeg_part(data: bytes, part: Part, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """RGB pixels (height, width, 3) uint8 of a part of a JPEG file, or None where it has to be decoded in full.

    Args:
        data: the file, from its first byte; what follows the first picture is not looked at.
        part: of the picture as it is stored, before its EXIF orientation is applied.
        size: height and width of the picture as it is stored.

    Note:
        Only to be called where `why_in_full` gives no reason against it.
    """
    if not is_complete(data):
        return None
    wide = _widened(part, size)
    pixels = find_turbojpeg().decode(data, wide, size)
    if pixels is None:
        return None
    return part.within(wide).of(pixels)


@functools.cache
def why_in_full() -> str:
    """Why every JPEG file is decoded in full here; empty where that is not so."""
    version = features.version_feature("libjpeg_turbo") or "0"
    # Older ones, and other libjpegs, smooth 4:4:0 chroma in another way.
    if tuple(int(number) for number in version.split(".")[:2]) < (2, 1):
        return "Pillow was built without libjpeg-turbo 2.1 or newer, and the pixels have to be the same"
    return find_turbojpeg().reason


def is_complete(data: bytes) -> bool:
    """Whether a JPEG file has every bit of every coefficient and its end, as far as the markers tell.

    What lacks the end is a truncated file, which Pillow refuses. What lacks scans is smoothed by libjpeg, over more
    than one MCU.
    """
    position, missing = 2, dict[int, list[bool]]()
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, start = data[position + 1], position + 4
        position += 2 + int.from_bytes(data[position + 2 : start], "big")
        segment = data[start:position]
        try:
            if marker in _FRAMES:
                missing = {segment[6 + 3 * index]: [True] * _COEFFICIENTS for index in range(segment[5])}
            elif marker == _START_OF_SCAN:
                _scan(segment, missing)
                found = _MARKER.search(data, position)
                if found is None:
                    return False
                position = found.start()
                if not any(map(any, missing.values())):
                    return data[position + 1] == _END_OF_IMAGE
        except (IndexError, KeyError):  # a short segment, or a scan of a component that no frame of these kinds has
            return False
    return False


def _scan(segment: bytes, missing: dict[int, list[bool]]) -> None:
    """Notes in `missing` which coefficients a scan completes: those whose lowest bit it has (T.81, B.2.3)."""
    count = segment[0]
    first, last, bits = segment[1 + 2 * count], segment[2 + 2 * count], segment[3 + 2 * count]
    for index in range(count):
        component = missing[segment[1 + 2 * index]]
        component[first : last + 1] = [(bits & 0xF) > 0] * (min(last, _COEFFICIENTS - 1) + 1 - first)


def _widened(part: Part, size: tuple[int, int]) -> Part:
    top, left = max(0, part.top - _MCU), max(0, part.left - _MCU) // _MCU * _MCU
    bottom, right = min(size[0], part.top + part.height + _MCU), min(size[1], part.left + part.width + _MCU)
    return Part(top, left, bottom - top, right - left)
