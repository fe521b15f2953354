"""What may be handed in as pictures, told apart by kind."""

from __future__ import annotations

import os
from collections.abc import Iterable

from PIL import Image

from runtime.decode import describe_source
from runtime.errors import UsageError
from runtime.file_part import FilePart

_SINGLE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)


def is_file(source: object) -> bool:
    """Whether it is a path, the bytes or a part of a file: two of these may be decoded at the same time.

    A file object or a Pillow image may be handed in twice, and must not be decoded twice at once.
    """
    return isinstance(source, (str, os.PathLike, bytes, FilePart))


def is_array(source: object) -> bool:
    """Whether it is pixels in memory, which need no decoding: a NumPy array or an object that speaks DLPack."""
    return hasattr(source, "__dlpack__")


def source_name(source: object, index: int) -> str:
    """Path of a source that has one, otherwise what it is and its place among the sources."""
    carried = getattr(source, "filename", None) or getattr(source, "name", None)
    named = isinstance(source, (str, os.PathLike)) or isinstance(carried, (str, os.PathLike))
    return describe_source(source) if named else f"#{index} ({describe_source(source)})"


def require_many(sources: object) -> None:
    """Nothing for a collection of pictures; a str or an array would else be taken apart character by row.

    Raises:
        UsageError: a single picture, or something that cannot be iterated.
    """
    one_array = is_array(sources) and getattr(sources, "ndim", None) != 4
    one_file = isinstance(sources, _SINGLE) or hasattr(sources, "read")
    if one_array or one_file or not isinstance(sources, Iterable):
        raise UsageError(
            "sources",
            got=f"one {type(sources).__name__}",
            wanted="a list, or another iterable, of pictures",
            remedy="put a single picture in a list: predict([picture])",
        )
