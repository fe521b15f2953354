"""Streams that count what reading a picture file costs, and end it where that is too much.

Pillow's readers of headers are written in Python, and take some things byte by byte: a JPEG file of nothing but fill
bytes keeps them busy for seconds a MiB, and so do empty chunks of a PNG file. A thread that reads cannot be ended from
outside; a stream can refuse.
"""

from __future__ import annotations

import io
import os
from typing import TypeAlias

# A read costs one, and one more for each 2 KiB that it gives, up to the 64 of a JPEG segment: Pillow joins those of one
# kind by copying what it has, which takes a second for the 17 MiB that this allows. Few pictures have one MiB of them.
_HEADER_COST = 10_000
_FULL_READ, _READ_UNIT = 1 << 16, 1 << 11
# Decoders read blocks of 64 KiB; what is left of the chunks of a PNG file is still read by Python.
_PIXEL_BYTES_A_READ = 256


class TooManyReads(Exception):
    """A picture file is in so many small pieces that reading it would take very long."""


class CountedBytes(io.BytesIO):
    """A stream of bytes that may be read a number of times: enough for a header, and for pixels after `allow_pixels`.

    Raises:
        TooManyReads: by `read`.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._count = _Count(len(data))

    def allow_pixels(self) -> None:
        """Allows the reads that the pixels need."""
        self._count.allow_pixels()

    def read(self, size: int | None = -1, /) -> bytes:
        """Bytes, as `io.BytesIO` gives them."""
        data = super().read(size)
        self._count.charge(data, self)
        return data


class CountedFile(io.BufferedReader):
    """A file that is opened like `CountedBytes`.

    Raises:
        TooManyReads: by `read`.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path))
        self._count = _Count(os.fstat(self.fileno()).st_size)

    def allow_pixels(self) -> None:
        """Allows the reads that the pixels need."""
        self._count.allow_pixels()

    def read(self, size: int | None = -1, /) -> bytes:
        """Bytes, as `io.BufferedReader` gives them."""
        data = super().read(size)
        self._count.charge(data, self)
        return data


CountedStream: TypeAlias = "CountedBytes | CountedFile"


class _Count:
    """What reading has cost, and how much it may."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._part = "header"
        self._reads, self._left = 0, _HEADER_COST

    def allow_pixels(self) -> None:
        self._part = "pixels"
        self._reads, self._left = 0, _HEADER_COST + self._size // _PIXEL_BYTES_A_READ

    def charge(self, data: bytes, stream: CountedStream) -> None:
        self._reads += 1
        self._left -= 1 + min(len(data), _FULL_READ) // _READ_UNIT
        if self._left < 0:
            place = f"byte {stream.tell()} of {self._size}"
            raise TooManyReads(f"a {self._part} in {self._reads} pieces up to {place}, and no end")
