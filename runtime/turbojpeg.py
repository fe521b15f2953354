"""The few calls of TurboJPEG 3 that decode a part of a JPEG file, through ctypes.

There is no package on the index whose interface offers them. The library comes from the system (libjpeg-turbo 3 or
newer), or from the extension module of the package pylibjxl, which has it built in and exports it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.preprocess import Part

_PACKAGE = "pylibjxl"
_SYSTEM_LIBRARIES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "turbojpeg.dll")
_EXTENSION_SUFFIXES = (".so", ".pyd")

# Members of enum TJINIT, TJPARAM, TJPF, TJCS and TJSAMP in turbojpeg.h, which are part of its stable interface.
_INIT_DECOMPRESS = 1
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 0, 4, 5, 6, 7, 8
_ARITHMETIC, _LOSSLESS = 14, 15
_PIXELS_RGB = 0
_COLORSPACES = (0, 1, 2)  # RGB, YCbCr, grey
_SUBSAMPLINGS = (0, 1, 2, 3, 4, 5)  # 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@dataclass(frozen=True)
class TurboJpeg:
    """A library that decodes parts of JPEG files, or the reason why there is none.

    Args:
        path: file or name that it was loaded from; None where there is none.
        reason: why there is none; empty where there is one.
        functions: the loaded library.
    """

    path: str | None
    reason: str
    functions: Any

    def decode(self, data: bytes, part: Part, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """RGB pixels (height, width, 3) of a part of a JPEG file, or None where the library has any objection.

        Args:
            data: the file.
            part: of the picture as it is stored; its left border must be a multiple of the width of an MCU.
            size: height and width that the file is expected to have.

        Note:
            Thread safe; the interpreter's lock is released meanwhile.
        """
        handle = self.functions.tj3Init(_INIT_DECOMPRESS)
        if not handle:
            return None
        try:
            return self._decoded(handle, data, part, size)
        finally:
            self.functions.tj3Destroy(handle)

    def _decoded(self, handle: int, data: bytes, part: Part, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        tj = self.functions
        tj.tj3Set(handle, _STOP_ON_WARNING, 1)
        if tj.tj3DecompressHeader(handle, data, len(data)) != 0 or not self._plain(handle, size):
            return None
        if tj.tj3SetCroppingRegion(handle, _Region(part.left, part.top, part.width, part.height)) != 0:
            return None
        pixels = np.empty((part.height, part.width, 3), np.uint8)
        # Pitch 0 stands for rows without gaps.
        failed = tj.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _PIXELS_RGB)
        return None if failed else pixels

    def _plain(self, handle: int, size: tuple[int, int]) -> bool:
        found = {
            name: self.functions.tj3Get(handle, name)
            for name in (_HEIGHT, _WIDTH, _PRECISION, _COLORSPACE, _SUBSAMPLING, _ARITHMETIC, _LOSSLESS)
        }
        return (
            (found[_HEIGHT], found[_WIDTH], found[_PRECISION]) == (*size, 8)
            and found[_COLORSPACE] in _COLORSPACES
            and found[_SUBSAMPLING] in _SUBSAMPLINGS
            and not found[_ARITHMETIC]
            and not found[_LOSSLESS]
        )


@functools.cache
def find_turbojpeg() -> TurboJpeg:
    """The library of the system where it is new enough, else that of the package; looked for once a process."""
    found = []
    for path in _candidates():
        try:
            return TurboJpeg(path, "", _declared(ctypes.CDLL(path)))
        except OSError:
            continue
        except AttributeError:
            found.append(path)
    reason = f"{', '.join(found)} is older than libjpeg-turbo 3" if found else "no libjpeg-turbo 3 was found"
    return TurboJpeg(None, reason, None)


def _candidates() -> Iterator[str]:
    yield from _SYSTEM_LIBRARIES
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob(f"_{_PACKAGE}*")):
            if path.suffix in _EXTENSION_SUFFIXES:
                yield os.fspath(path)


def _declared(library: Any) -> Any:
    """The library with the types of what is called.

    Raises:
        AttributeError: it lacks one of them.
    """
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("tj3Init", pointer, (number,)),
        ("tj3Destroy", None, (pointer,)),
        ("tj3Set", number, (pointer, number, number)),
        ("tj3Get", number, (pointer, number)),
        ("tj3DecompressHeader", number, (pointer, ctypes.c_char_p, size)),
        ("tj3SetCroppingRegion", number, (pointer, _Region)),
        ("tj3Decompress8", number, (pointer, ctypes.c_char_p, size, pointer, number, number)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
