from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from runtime.decode import check_header, decode_picture
from runtime.errors import PictureError, PictureFormatError, PictureTooLargeError
from runtime.file_part import FilePart
from runtime.pillow_guard import neutral_pillow

# A photograph-like ramp: smooth, so that JPEG keeps it within a few levels.
_Y, _X = np.mgrid[0:24, 0:32]
RAMP = np.stack([_X * 8, _Y * 10, 255 - _X * 4 - _Y * 4], axis=2).astype(np.uint8)


def _encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _png(width, height, *, depth=8, colour=2, rows=b"", extra=b""):
    """PNG bytes written by hand; `rows` is the raw, filtered pixel data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _decode(source, **options):
    result = decode_picture(source, **options)
    assert result.dtype == np.uint8
    assert result.ndim == 3
    assert result.shape[2] == 3
    assert result.flags.c_contiguous
    return result


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(form):
    np.testing.assert_array_equal(_decode(_encoded(Image.fromarray(RAMP), form)), RAMP)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_back_closely(form):
    if form not in (Image.init(), Image.OPEN)[1]:
        pytest.skip(f"this Pillow was built without {form}")
    result = _decode(_encoded(Image.fromarray(RAMP), form, quality=95))
    assert np.abs(result.astype(int) - RAMP).mean() < 4


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    data = path.read_bytes()
    with path.open("rb") as file:
        from_file = _decode(file)
    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), RAMP]
    with Image.open(path) as image:
        results = [_decode(source) for source in [*sources, image]]
    for result in [*results, from_file]:
        np.testing.assert_array_equal(result, RAMP)


def test_stream_that_cannot_seek_is_read():
    read, write = os.pipe()
    with os.fdopen(write, "wb") as sink:
        sink.write(_encoded(Image.fromarray(RAMP), "PNG"))
    with os.fdopen(read, "rb") as stream:
        np.testing.assert_array_equal(_decode(stream), RAMP)


def test_contiguous_array_is_not_copied():
    assert decode_picture(RAMP) is RAMP or np.shares_memory(decode_picture(RAMP), RAMP)
    flipped = _decode(RAMP[:, ::-1])
    np.testing.assert_array_equal(flipped, RAMP[:, ::-1])


class Foreign:
    """An array of another library: it shows its memory with DLPack, and says where that is."""

    def __init__(self, values, device=1):
        self.values, self.shape, self.device = values, values.shape, device

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device, 0


def test_array_whose_library_fails_in_its_own_way_is_refused_as_a_picture():
    class Broken(Foreign):
        def __dlpack_device__(self):
            raise AttributeError("no such thing")

    with pytest.raises(PictureError, match=r"not given out \(no such thing\)"):
        decode_picture(Broken(np.zeros((5, 7, 3), np.uint8)))


def test_array_of_another_library_is_read_without_a_copy():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = decode_picture(Foreign(rgb))
    np.testing.assert_array_equal(decoded, rgb)
    assert np.shares_memory(decoded, rgb)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Foreign(np.zeros((4, 4, 3), np.uint8), device=2), r"Foreign \(4, 4, 3\): got an array on DLPack device 2"),
        (Foreign(np.zeros((4, 4, 3), np.float32)), r"got float32 \(4, 4, 3\), wanted uint8"),
        (Foreign(np.zeros((3, 4, 4), np.uint8)), r"got uint8 \(3, 4, 4\), wanted uint8"),
        (Foreign(np.zeros((4, 4), np.uint8)), r"got uint8 \(4, 4\), wanted uint8"),
        (Foreign(np.zeros((4, 4, 3), object)), "got an array that is not given out"),
    ],
)
def test_array_of_another_library_that_cannot_be_read_is_refused(array, message):
    with pytest.raises(PictureError, match=message):
        decode_picture(array)


def test_single_pixel_decodes():
    assert _decode(_encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).tolist() == [[[9, 8, 7]]]


def test_suffix_does_not_matter_when_the_file_is_named(tmp_path):
    path = tmp_path / "actually-png.jpg"
    path.write_bytes(_encoded(Image.fromarray(RAMP), "PNG"))
    np.testing.assert_array_equal(_decode(path), RAMP)


@pytest.mark.parametrize("name", ["with spaces.png", "naïve – 写真.png", "tab\there.png", "-dash.png"])
def test_any_file_name_works(tmp_path, name):
    Image.fromarray(RAMP).save(tmp_path / name)
    np.testing.assert_array_equal(_decode(tmp_path / name), RAMP)


# The defined conversions


def test_grey_is_repeated_over_the_channels():
    grey = RAMP[..., 0]
    np.testing.assert_array_equal(_decode(_encoded(Image.fromarray(grey), "PNG")), np.dstack([grey] * 3))


def test_black_and_white_becomes_0_and_255():
    bits = RAMP[..., 0] > 100
    result = _decode(_encoded(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(result, np.dstack([bits * np.uint8(255)] * 3))


def test_sixteen_bit_grey_png_loses_its_low_byte():
    values = (np.arange(24 * 32, dtype=np.uint16) * 85).reshape(24, 32)
    result = _decode(_encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(result, np.dstack([(values >> 8).astype(np.uint8)] * 3))


@pytest.mark.parametrize("form", ["TIFF", "PGM"])
def test_sixteen_bit_grey_of_other_formats_loses_its_low_byte(form):
    values = (np.arange(24 * 32, dtype=np.uint16) * 85).reshape(24, 32)
    by_hand = b"P5 32 24 65535\n" + values.astype(">u2").tobytes()
    result = _decode(by_hand if form == "PGM" else _encoded(Image.fromarray(values), form))
    np.testing.assert_array_equal(result[..., 1], (values >> 8).astype(np.uint8))


def test_sixteen_bit_rgb_png_loses_its_low_bytes():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    np.testing.assert_array_equal(_decode(_png(7, 5, depth=16, rows=rows)), (values >> 8).astype(np.uint8))


def test_sixteen_bit_grey_with_a_transparent_value_shows_white_there():
    values = np.array([[0x1234, 0x12FF]], ">u2")
    trns = _chunk(b"tRNS", struct.pack(">H", 0x1234))
    data = _png(2, 1, depth=16, colour=0, rows=b"\0" + values.tobytes(), extra=trns)
    assert _decode(data)[0, :, 0].tolist() == [255, 0x12]


def test_32_bit_integers_beyond_16_are_refused():
    data = _encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF")
    with pytest.raises(PictureError, match="32 bits a channel"):
        decode_picture(data)


def test_floating_point_pixels_are_refused():
    data = _encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF")
    with pytest.raises(PictureError, match="floating point pixels"):
        decode_picture(data)


def test_cmyk_jpeg_is_converted():
    data = _encoded(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=95)
    result = _decode(data)
    assert np.abs(result.astype(int) - RAMP).mean() < 6


def test_transparency_is_composited_on_white():
    rgba = np.dstack([RAMP, np.full(RAMP.shape[:2], 255, np.uint8)])
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 51
    result = _decode(_encoded(Image.fromarray(rgba), "PNG"))
    assert (result[0] == 255).all()
    expected = np.round(RAMP[1] * 0.2 + 255 * 0.8)
    assert np.abs(result[1] - expected).max() <= 1
    np.testing.assert_array_equal(result[2:], RAMP[2:])


def test_grey_with_alpha_is_composited_on_white():
    la = np.dstack([RAMP[..., 0], np.zeros(RAMP.shape[:2], np.uint8)])
    la[1:, :, 1] = 255
    result = _decode(_encoded(Image.fromarray(la), "PNG"))
    assert (result[0] == 255).all()
    np.testing.assert_array_equal(result[1:, :, 2], RAMP[1:, :, 0])


@pytest.mark.parametrize("transparency", [0, bytes([0, 255, 128])])
def test_palette_with_alpha_is_composited_on_white(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    result = _decode(_encoded(image, "PNG", transparency=transparency))
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[0, 1].tolist() == [40, 50, 60]


def test_transparent_colour_of_an_rgb_png_is_white():
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    data = _encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3))
    assert _decode(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_palette_without_alpha_gives_its_colours():
    image = Image.fromarray(np.array([[1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert _decode(_encoded(image, "PNG")).tolist() == [[[40, 50, 60], [10, 20, 30]]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(250, 0, 0), (0, 250, 0), (0, 0, 250)]]
    options = {"lossless": True} if form == "WEBP" else {}
    data = _encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert _decode(data)[4, 4].tolist() == [250, 0, 0]


def test_pillow_image_is_read_at_the_frame_it_is_at():
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(250, 0, 0), (0, 250, 0)]]
    with Image.open(io.BytesIO(_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))) as image:
        image.seek(1)
        assert _decode(image)[4, 4].tolist() == [0, 250, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    # Upright: red left, blue right in the upper half; the file stores it turned, as a camera does.
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    result = _decode(_encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options))
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() <= (8 if form == "JPEG" else 0)


def test_orientation_of_a_pillow_image_is_applied_and_the_image_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encoded(Image.fromarray(RAMP), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert _decode(image).shape == (32, 24, 3)
        assert image.size == (32, 24)
        assert image.getexif()[0x0112] == 6


def test_orientation_survives_palette_with_alpha():
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    exif = Image.Exif()
    exif[0x0112] = 6
    result = _decode(_encoded(image, "PNG", transparency=0, exif=exif))
    assert result.tolist() == [[[255, 255, 255]], [[40, 50, 60]]]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_stop_a_sound_picture(exif):
    assert _decode(_encoded(Image.fromarray(RAMP), "JPEG", exif=exif)).shape == RAMP.shape


# What is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "no bytes at all"),
        (io.BytesIO(), "no bytes at all"),
        (b"this is text", "no known picture format"),
        (b"%PDF-1.4 whatever", "no known picture format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known picture format"),
        (io.StringIO("text"), "text mode"),
        (None, "got a NoneType"),
        (3.5, "got a float"),
        (RAMP.astype(np.float32), "got float32"),
        (RAMP[..., 0], r"got uint8 \(24, 32\)"),
        (np.dstack([RAMP, RAMP[..., :1]]), r"got uint8 \(24, 32, 4\)"),
        (RAMP.transpose(2, 0, 1), r"got uint8 \(3, 24, 32\)"),
        (np.zeros((0, 5, 3), np.uint8), "got uint8"),
    ],
)
def test_source_that_is_no_picture_is_refused(source, message):
    with pytest.raises(PictureError, match=message):
        decode_picture(source)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(PictureError, match=r"gone\.jpg: got no such file"):
        decode_picture(tmp_path / "gone.jpg")


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(PictureError, match=r"empty\.jpg: got an empty file"):
        decode_picture(tmp_path / "empty.jpg")


def test_folder_is_refused(tmp_path):
    with pytest.raises(PictureError, match="got a folder"):
        decode_picture(tmp_path)


def test_text_named_jpg_is_refused(tmp_path):
    (tmp_path / "note.jpg").write_text("not a picture at all")
    with pytest.raises(PictureError, match=r"note\.jpg: got data of no known picture format"):
        decode_picture(tmp_path / "note.jpg")


@pytest.mark.parametrize("path", ["", "a\0b.jpg", "x" * 5000])
def test_impossible_path_is_refused(path):
    with pytest.raises(PictureError, match=r"check the path|a folder"):
        decode_picture(path)


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError, match="no regular file"):
        decode_picture(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_file_is_refused(form, share):
    if form not in (Image.init(), Image.OPEN)[1]:
        pytest.skip(f"this Pillow was built without {form}")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = _encoded(Image.fromarray(noise), form)
    with pytest.raises(PictureError, match=r"damaged data|no known picture format"):
        decode_picture(data[: int(len(data) * share)])


def test_closed_pillow_image_is_refused():
    image = Image.open(io.BytesIO(_encoded(Image.fromarray(RAMP), "PNG")))
    image.close()
    with pytest.raises(PictureError, match="damaged data"):
        decode_picture(image)


def test_header_that_claims_a_huge_picture_is_refused_before_decoding(monkeypatch):
    data = _png(60000, 60000, rows=b"\0")
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(self.size))
    with pytest.raises(PictureError, match=r"too many pixels|60000x60000 pixels"):
        decode_picture(data)
    assert loads == []


def test_huge_header_is_refused_whatever_pillow_would_allow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PictureError, match="60000x60000 pixels, wanted at most 100000000 pixels"):
        decode_picture(_png(60000, 60000, rows=b"\0"))


@pytest.mark.parametrize("source", [RAMP, Foreign(RAMP), Image.fromarray(RAMP), _encoded(Image.fromarray(RAMP), "PNG")])
def test_pixel_limit_is_inclusive_and_holds_for_every_source(source):
    assert decode_picture(source, max_pixels=24 * 32).shape == RAMP.shape
    with pytest.raises(PictureError, match="32x24 pixels, wanted at most 767 pixels"):
        decode_picture(source, max_pixels=24 * 32 - 1)


def _tiled_tiff(width, length, *, kind=4):
    """A grey 64x64 TIFF, deflated, whose header says that it has tiles of this size; there is little behind it."""
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, kind, 1, width), (323, kind, 1, length), (324, 4, 1, 200), (325, 4, 1, 40)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return header.ljust(200, b"\0") + zlib.compress(bytes(64 * 64)).ljust(100, b"\0")


@pytest.mark.parametrize(("width", "length"), [(40_000, 40_000), (16, 100_000_000), (0x7FFFFFF0, 0x7FFFFFF0)])
def test_tiff_whose_tile_is_larger_than_any_picture_is_refused_before_it_is_decoded(width, length, monkeypatch):
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", None)
    with pytest.raises(PictureTooLargeError, match=f"tiles of {width}x{length} pixels, wanted at most 100000000"):
        decode_picture(_tiled_tiff(width, length))


def test_tiff_with_tiles_of_a_usual_size_is_read():
    assert decode_picture(_tiled_tiff(64, 64)).shape == (64, 64, 3)
    assert decode_picture(_tiled_tiff(64, 64), max_pixels=64 * 64).shape == (64, 64, 3)


@pytest.mark.parametrize("kind", [2, 5, 12])  # text, a fraction, a float
def test_tiff_whose_tile_has_no_whole_sides_is_refused(kind):
    with pytest.raises(PictureError, match=r"got tiles of .*, wanted two whole numbers"):
        decode_picture(_tiled_tiff(200, 200, kind=kind))


def test_endless_stream_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("runtime.decode.MAX_STREAM_BYTES", 1000)
    with open("/dev/zero", "rb") as stream, pytest.raises(PictureError, match="more than 1000 bytes"):
        decode_picture(stream)


def test_part_of_a_file_is_the_picture_in_it(tmp_path):
    data = _encoded(Image.fromarray(RAMP), "PNG")
    path = tmp_path / "around"
    path.write_bytes(b"before" + data + b"behind")
    part = FilePart("ramp", str(path), 6, len(data))
    np.testing.assert_array_equal(decode_picture(part), RAMP)
    for wrong, message in (
        (replace(part, size_bytes=len(data) + 7), "ramp: got a part of a file that cannot be read .*ends within it"),
        (replace(part, path=str(tmp_path / "none")), r"ramp: got a part .*\(No such file or directory\)"),
        (replace(part, size_bytes=0), "ramp: got no bytes at all"),
    ):
        with pytest.raises(PictureError, match=message):
            decode_picture(wrong)


def test_part_of_a_file_above_the_limit_is_refused_unread(monkeypatch):
    monkeypatch.setattr("runtime.decode.MAX_STREAM_BYTES", 1000)
    with pytest.raises(PictureError, match="ramp: got 1001 bytes, wanted at most 1000 bytes"):
        decode_picture(FilePart("ramp", "not even opened", 0, 1001))


# Settings of the program around us


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_setting_that_accepts_truncated_files_does_not_change_the_answer(monkeypatch, form):
    data = _encoded(Image.fromarray(np.tile(RAMP, (4, 4, 1))), form)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(PictureError, match="damaged data"):
        decode_picture(data[: len(data) * 2 // 3])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_low_pixel_limit_of_the_host_does_not_change_the_answer(monkeypatch, form):
    data = _encoded(Image.fromarray(RAMP), form)
    expected = decode_picture(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(decode_picture(data), expected)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_pillow_warning_does_not_leak(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    data = _encoded(Image.fromarray(RAMP), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)):
            pass
        assert [item.category for item in caught] == [Image.DecompressionBombWarning]
        caught.clear()
        decode_picture(data, max_pixels=800)
    assert caught == []


def test_warning_filters_of_the_host_come_back_after_concurrent_decoding():
    data = _encoded(Image.fromarray(np.tile(RAMP, (8, 8, 1))), "PNG")
    before = list(warnings.filters)
    threads = [threading.Thread(target=decode_picture, args=(data,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_nested_guard_restores_only_at_the_outermost_exit(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with neutral_pillow(100):
        with neutral_pillow(100):
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_decoding_from_a_file_leaves_no_file_open(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    (tmp_path / "bad.png").write_bytes(path.read_bytes()[:60])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        decode_picture(path)
        with pytest.raises(PictureError, match=r"damaged|no known"):
            decode_picture(tmp_path / "bad.png")
    assert len(os.listdir("/proc/self/fd")) == before


# headers


def test_header_of_a_sound_picture_passes_and_its_pixels_are_not_looked_at():
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "PNG")
    check_header(stream.getvalue(), max_pixels=1200)
    cut_off = stream.getvalue()[:60]
    check_header(cut_off, max_pixels=1200)
    with pytest.raises(PictureError, match="damaged"):
        decode_picture(cut_off)


def test_header_tells_an_unknown_format_and_too_many_pixels_apart():
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "PNG")
    with pytest.raises(PictureTooLargeError, match="40x30 pixels, wanted at most 1199"):
        check_header(stream.getvalue(), max_pixels=1199)
    with pytest.raises(PictureFormatError, match="no known picture format"):
        check_header(b"no picture")
    with pytest.raises(PictureError, match="no bytes at all"):
        check_header(b"")
