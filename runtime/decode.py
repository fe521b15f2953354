"""Any accepted picture source to an RGB array, with stated limits.

Defined here once: the first frame of an animation, the EXIF orientation applied, transparency composited on
white, 16 bits a channel reduced to 8 by dropping the low byte, CMYK converted without a colour profile. A
header that claims more than the pixel limit is refused before anything is decoded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtime.counted_streams import CountedBytes, CountedFile, CountedStream
from runtime.errors import PictureError, PictureFormatError, PictureMemoryError, PictureTooLargeError
from runtime.file_part import FilePart
from runtime.jpeg_region import decode_jpeg_part, why_in_full
from runtime.jpeg_scans import MOST_SCANS, has_too_many_scans
from runtime.limits import MAX_PIXELS
from runtime.pillow_guard import neutral_pillow
from runtime.preprocess import Part, require_rgb


class SupportsDLPack(Protocol):
    """An array of any library that can show its memory, as PyTorch's and JAX's do (DLPack)."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """The array as a DLPack capsule."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Kind and number of the device that holds the array."""


PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | FilePart | BinaryIO | Image.Image | NDArray[np.uint8] | SupportsDLPack"
)

# Bound on what is read into memory as a whole: a stream, which may never end, or a part of a file. 100 megapixels of
# 16-bit RGB are 600 MB.
MAX_STREAM_BYTES = 1 << 30
# A JPEG file is read as a whole to decode a part of it; 100 megapixels at the highest quality are about as much.
_MAX_JPEG_BYTES = 1 << 28

# What a scan of a folder takes for pictures; a file that is named outright is tried whatever its suffix.
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm",
    ".pgm",
)  # fmt: skip

# Pillow's names. No PostScript, PDF or Windows metafiles: those run interpreters.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "PPM")
# dlpack.h: kDLCPU, kDLCUDAHost, kDLROCMHost.
_CPU_MEMORY = (1, 3, 11)
_ORIENTATION_TAG = 0x0112
# Of TIFF 6.0, section 15.
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_WANTED = "a picture file (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM)"


class DecodedPart(NamedTuple):
    """A part of a picture.

    rgb (part.height, part.width, 3) uint8; height and width are those of the whole picture, upright.
    """

    rgb: NDArray[np.uint8]
    part: Part
    height: int
    width: int


def decode_picture(source: PictureSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) uint8, C-contiguous, of one picture.

    Args:
        source: a path, the bytes of a file, a part of a file, a binary file object (read from where it stands), a
            Pillow image (the frame it is at), or a uint8 (H, W, 3) RGB array, which comes back uncopied when
            contiguous; an array of another library that shows its memory with DLPack is one, where it is in the
            CPU's memory.
        max_pixels: largest height times width that is accepted, whatever the source.

    Raises:
        PictureError: the source cannot be read, is no picture, is damaged, or exceeds the limit.

    Note:
        Thread safe, except that one Pillow image or file object must not be decoded twice at the same time.
    """
    return np.ascontiguousarray(decode_part(source, whole_part, max_pixels=max_pixels).rgb)


def decode_part(
    source: PictureSource, part_of: Callable[[int, int], Part], *, max_pixels: int = MAX_PIXELS
) -> DecodedPart:
    """The same pixels as in the picture of `decode_picture`, without the work for the others where it can be saved.

    Args:
        source: as for `decode_picture`; an array is not copied.
        part_of: which part of a picture of this height and width, upright, is wanted; it must lie inside.
        max_pixels: largest height times width of the picture that is accepted, whatever the source.

    Raises:
        PictureError: as for `decode_picture`.

    Note:
        A JPEG file is decoded in part alone where `runtime.jpeg_region` can; other files are decoded and then cropped.
    """
    name = describe_source(source)
    if hasattr(source, "__dlpack__"):
        source = _from_dlpack(source, name)
        require_rgb(source)
        _require_size(name, source.shape[1], source.shape[0], max_pixels)
        part = part_of(*source.shape[:2])
        return DecodedPart(part.of(source), part, *source.shape[:2])
    with _as_picture_error(name), neutral_pillow(max_pixels):
        if isinstance(source, Image.Image):
            _require_size(name, *source.size, max_pixels)
            return _decoded_part(source, part_of, name)
        with _opened(source, name) as stream, _identified(stream, name) as image:
            _require_size(name, *image.size, max_pixels)
            _require_tile(name, image, max_pixels)
            _require_few_scans(image, stream, name)
            return _jpeg_part(image, stream, part_of) or _decoded_part(image, part_of, name)


def whole_part(height: int, width: int) -> Part:
    """All of a picture."""
    return Part(0, 0, height, width)


def check_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Nothing for the bytes of a picture file whose header is of a known format and within the limit.

    Args:
        data: content of the file; its pixels are not decoded, so they may still be damaged.
        max_pixels: largest height times width that is accepted.

    Raises:
        PictureFormatError: the data are of no known format.
        PictureTooLargeError: the header claims more pixels.
        PictureError: the header is damaged.
    """
    name = describe_source(data)
    with (
        _as_picture_error(name),
        neutral_pillow(max_pixels),
        _opened(data, name) as stream,
        _identified(stream, name) as image,
    ):
        _require_size(name, *image.size, max_pixels)


def describe_source(source: object) -> str:
    """Name of a picture source for people: its path, the file name it carries, or the kind of object."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source) or "''"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if hasattr(source, "__dlpack__"):
        kind = "array" if isinstance(source, np.ndarray) else type(source).__name__
        return f"{kind} {tuple(getattr(source, 'shape', ()))}"
    carried = getattr(source, "filename", None) or getattr(source, "name", None)
    if isinstance(carried, (str, os.PathLike)):
        return os.fspath(carried)
    return f"{type(source).__name__} object"


def _from_dlpack(source: Any, name: str) -> NDArray[Any]:
    """The array itself, or NumPy's view of the memory of another library's."""
    if isinstance(source, np.ndarray):
        return source
    remedy = "move it to the CPU as uint8 (height, width, 3), for PyTorch with tensor.detach().cpu()"
    try:
        device = int(source.__dlpack_device__()[0])
        if device not in _CPU_MEMORY:
            raise _refusal(name, f"an array on DLPack device {device}", "one in the CPU's memory", remedy)
        return np.from_dlpack(source)
    except PictureError:
        raise
    except Exception as error:  # whatever the other library raises belongs to this picture alone
        raise _refusal(name, f"an array that is not given out ({error})", "one that NumPy can read", remedy) from error


@contextmanager
def _as_picture_error(name: str) -> Iterator[None]:
    """Whatever a decoder raises on a damaged file, as a PictureError; Pillow raises almost anything."""
    try:
        yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureTooLargeError(
            name, got=f"too many pixels ({error})", wanted="a picture within the limit", remedy="scale it down"
        ) from error
    except MemoryError as error:
        raise PictureMemoryError(
            name, got="no memory left to decode it", wanted=_WANTED, remedy="decode fewer at once"
        ) from error
    except Exception as error:
        text = str(error) or type(error).__name__
        raise _refusal(name, f"damaged data ({text})", _WANTED, "replace the file with an intact one") from error


def _refusal(name: str, got: str, wanted: str, remedy: str) -> PictureError:
    return PictureError(name, got=got, wanted=wanted, remedy=remedy)


def _opened(source: Any, name: str) -> CountedStream:
    """Seekable stream over the bytes of a path, a buffer or a file object."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _non_empty(bytes(source), name)
    if isinstance(source, (str, os.PathLike)):
        return _opened_file(Path(source), name)
    if isinstance(source, FilePart):
        return _non_empty(_content(source, name), name)
    if not callable(getattr(source, "read", None)):
        raise _refusal(
            name,
            f"a {type(source).__name__}",
            "a path, bytes, a binary file object, a Pillow image or a uint8 array",
            "convert it to one of these",
        )
    data = source.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise _refusal(name, "a file object in text mode", "one that reads bytes", "open it with mode 'rb'")
    if len(data) > MAX_STREAM_BYTES:
        raise _refusal(name, f"more than {MAX_STREAM_BYTES} bytes", "a shorter stream", "pass a path instead")
    return _non_empty(data, name)


def _opened_file(path: Path, name: str) -> CountedStream:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise _refusal(name, "no such file", _WANTED, "check the path") from error
    except (OSError, ValueError) as error:
        raise _refusal(name, f"a path that cannot be read ({error})", _WANTED, "check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise _refusal(name, "a folder", _WANTED, "pass the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(name, "something that is no regular file", _WANTED, "pass its bytes")
    if status.st_size == 0:
        raise _refusal(name, "an empty file", _WANTED, "fetch or write the file again")
    try:
        return CountedFile(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise _refusal(name, f"a file that cannot be read ({reason})", _WANTED, "check its permissions") from error


def _content(part: FilePart, name: str) -> bytes:
    if part.size_bytes > MAX_STREAM_BYTES:
        remedy = "keep the picture as a file of its own"
        raise _refusal(name, f"{part.size_bytes} bytes", f"at most {MAX_STREAM_BYTES} bytes", remedy)
    try:
        return part.read()
    except OSError as error:
        reason = error.strerror or str(error)
        raise _refusal(name, f"a part of a file that cannot be read ({reason})", _WANTED, "check the file") from error


def _non_empty(data: bytes, name: str) -> CountedStream:
    if not data:
        raise _refusal(name, "no bytes at all", _WANTED, "pass the whole content of the file")
    return CountedBytes(data)


def _identified(stream: CountedStream, name: str) -> Image.Image:
    Image.init()
    formats = [form for form in _FORMATS if form in Image.OPEN]  # AVIF and WebP depend on how Pillow was built
    try:
        image = Image.open(stream, formats=formats)
    except UnidentifiedImageError as error:
        raise PictureFormatError(
            name, got="data of no known picture format", wanted=_WANTED, remedy="convert it to PNG or JPEG"
        ) from error
    stream.allow_pixels()
    return image


def _require_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _refusal(name, f"{width}x{height} pixels", "at least 1x1", "replace the file with an intact one")
    if width * height > max_pixels:
        raise PictureTooLargeError(
            name,
            got=f"{width}x{height} pixels",
            wanted=f"at most {max_pixels} pixels in all",
            remedy="crop it, or raise max_pixels if memory allows",
        )


def _require_tile(name: str, image: Image.Image, max_pixels: int) -> None:
    """Refuses a TIFF with too large a tile: libtiff fills the memory of a whole one, however small the picture is."""
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_LENGTH_TAG, 0)
    if not all(isinstance(side, int) for side in tile):
        raise _refusal(name, f"tiles of {tile} pixels", "two whole numbers", "replace the file with an intact one")
    if tile[0] * tile[1] > max_pixels:
        raise PictureTooLargeError(
            name,
            got=f"tiles of {tile[0]}x{tile[1]} pixels",
            wanted=f"at most {max_pixels} pixels in a tile",
            remedy="write it with smaller tiles",
        )


def _require_few_scans(image: Image.Image, stream: BinaryIO, name: str) -> None:
    if image.format not in ("JPEG", "MPO") or not image.info.get("progressive"):
        return  # the scans of others are as long as what they describe
    place = stream.tell()
    stream.seek(0)
    data = stream.read(_MAX_JPEG_BYTES + 1)
    stream.seek(place)
    if len(data) > _MAX_JPEG_BYTES:
        raise _refusal(name, f"a progressive JPEG file of more than {_MAX_JPEG_BYTES} bytes", _WANTED, "save it anew")
    if has_too_many_scans(data):
        raise _refusal(name, "more scans than pictures have", f"at most {MOST_SCANS}", "save it anew")


def _jpeg_part(image: Image.Image, stream: BinaryIO, part_of: Callable[[int, int], Part]) -> DecodedPart | None:
    """A part of a JPEG file that Pillow has opened but not decoded; None where it has to be decoded in full."""
    # MPO is a JPEG file with more of them behind it: several views of a camera, or a phone's depth map.
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or why_in_full():
        return None
    stream.seek(0)
    data = stream.read(_MAX_JPEG_BYTES + 1)
    placing = _Placing(image)
    part, stored = placing.of(part_of)
    pixels = decode_jpeg_part(data, stored, (image.height, image.width)) if len(data) <= _MAX_JPEG_BYTES else None
    return None if pixels is None else DecodedPart(placing.upright(pixels), part, *placing.size)


def _decoded_part(image: Image.Image, part_of: Callable[[int, int], Part], name: str) -> DecodedPart:
    image.load()
    placing = _Placing(image)
    part, stored = placing.of(part_of)
    if image.mode[0] in "IF":
        # Whether the values fit into 8 or 16 bits is asked of the whole picture.
        rgb = stored.of(_to_rgb(image, name))
    else:
        box = (stored.left, stored.top, stored.left + stored.width, stored.top + stored.height)
        rgb = _to_rgb(image if box == (0, 0, *image.size) else image.crop(box), name)
    return DecodedPart(placing.upright(rgb), part, *placing.size)


class _Placing:
    """How an image as it is stored becomes the picture as its EXIF orientation wants it seen (Exif 2.32)."""

    def __init__(self, image: Image.Image) -> None:
        orientation = _orientation(image)
        self._rows_mirrored = orientation in (3, 4, 6, 7)
        self._columns_mirrored = orientation in (2, 3, 7, 8)
        self._turned = orientation in (5, 6, 7, 8)  # rows and columns change places, after the mirroring
        self._stored = (image.height, image.width)
        self.size = self._stored[::-1] if self._turned else self._stored

    def of(self, part_of: Callable[[int, int], Part]) -> tuple[Part, Part]:
        """The wanted part of the upright picture, and the same as it is stored."""
        part = part_of(*self.size)
        top, left, height, width = (part.left, part.top, part.width, part.height) if self._turned else part
        if self._rows_mirrored:
            top = self._stored[0] - top - height
        if self._columns_mirrored:
            left = self._stored[1] - left - width
        return part, Part(top, left, height, width)

    def upright(self, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """View of stored pixels as they are seen."""
        rows = stored[::-1] if self._rows_mirrored else stored
        both = rows[:, ::-1] if self._columns_mirrored else rows
        return both.transpose(1, 0, 2) if self._turned else both


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata say nothing about the pixels, which decoded well
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image, name)
    if image.mode == "F":
        raise _refusal(name, "floating point pixels", "8 or 16 bits a channel", "convert it to an 8-bit PNG")
    if image.has_transparency_data:
        return _on_white(image)
    try:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise _refusal(name, f"colour mode {image.mode}", "RGB, grey, palette or CMYK", "convert to RGB") from error


def _grey16_to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise _refusal(name, "32 bits a channel", "8 or 16 bits a channel", "convert it to an 8-bit PNG")
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info = image.info | {"transparency": tuple(value >> 8 for value in key)}
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, rgba))[..., :3]
