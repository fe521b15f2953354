"""Headers that would keep Pillow busy, refused where they stand; headers of ordinary pictures, read as before."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz_targets import targets
from runtime import counted_streams
from runtime.decode import check_header, decode_picture
from runtime.errors import PictureError

MANY = 1 << 17


def jpeg(**options):
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (90, 120, 30)).save(stream, "JPEG", **options)
    return stream.getvalue()


def png_chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND")


HEAD, TAIL = jpeg()[:2], jpeg()[2:]
PIXELS = png_chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
HOSTILE = {
    "fill bytes": HEAD + b"\xff" * MANY + TAIL,
    "stuffed bytes": HEAD + b"\xff\x00" * MANY + TAIL,
    "bytes between segments": HEAD + b"\xff\xd8" + bytes(MANY) + TAIL,
    "empty segments": HEAD + b"\xff\xfe\x00\x02" * MANY + TAIL,
    "empty chunks": png(png_chunk(b"abCd") * MANY, PIXELS),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_header_in_very_many_pieces_is_refused_with_the_place(name, tmp_path):
    data = HOSTILE[name]
    (tmp_path / "hostile").write_bytes(data)
    for source in (data, tmp_path / "hostile"):
        with pytest.raises(PictureError, match=rf"a header in \d+ pieces up to byte \d+ of {len(data)}, and no end"):
            decode_picture(source)
    with pytest.raises(PictureError, match="a header in"):
        check_header(data)


def test_full_segments_cost_more_than_small_ones(monkeypatch):
    monkeypatch.setattr(counted_streams, "_HEADER_COST", 1000)
    small, full = (b"\xff\xe1" + struct.pack(">H", size) + b"Exif\0\0" + bytes(size - 8) for size in (100, 65535))
    check_header(HEAD + small * 40 + TAIL)
    with pytest.raises(PictureError, match="a header in"):
        check_header(HEAD + full * 40 + TAIL)


def test_pixels_in_very_many_pieces_are_refused():
    data = png(png_chunk(b"IDAT") * MANY, PIXELS)
    check_header(data)
    with pytest.raises(PictureError, match=r"pixels in \d+ pieces up to byte"):
        decode_picture(data)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"\xff" * 4096 + TAIL,
        jpeg(icc_profile=bytes(4_000_000), exif=b"Exif\0\0" + bytes(60_000), comment=b"x" * 60_000),
        png(*(png_chunk(b"tEXt", b"a\0b") for _ in range(1000)), PIXELS),
    ],
)
def test_large_headers_that_pictures_have_are_read(data, tmp_path):
    (tmp_path / "picture").write_bytes(data)
    np.testing.assert_array_equal(decode_picture(data), decode_picture(tmp_path / "picture"))


def test_pictures_of_every_format_need_a_hundredth_of_what_is_allowed(tmp_path, monkeypatch):
    (pictures,) = (target.seeds for target in targets(tmp_path) if target.name == "pictures")
    monkeypatch.setattr(counted_streams, "_HEADER_COST", counted_streams._HEADER_COST // 100)
    assert {decode_picture(data).shape for data in pictures} == {(24, 20, 3), (20, 24, 3)}


def test_stream_gives_what_a_plain_one_gives(tmp_path):
    data = bytes(range(256)) * 300
    (tmp_path / "file").write_bytes(data)
    for stream in (counted_streams.CountedBytes(data), counted_streams.CountedFile(tmp_path / "file")):
        with stream:
            assert stream.read(10) == data[:10]
            assert stream.seek(-5, io.SEEK_END) == len(data) - 5
            assert stream.read() == data[-5:]
            stream.seek(0)
            assert stream.read(None) == data
