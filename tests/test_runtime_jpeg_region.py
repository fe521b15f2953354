"""A part of a JPEG file equals that part of what Pillow decodes, whatever the file; the fast way is really taken."""

from __future__ import annotations

import ctypes
import io
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

import runtime.jpeg_region
import runtime.turbojpeg
from runtime import Detector
from runtime.decode import decode_part, decode_picture
from runtime.errors import PictureError
from runtime.jpeg_region import decode_jpeg_part, is_complete, why_in_full
from runtime.preprocess import Part
from runtime.turbojpeg import find_turbojpeg

SUBSAMPLINGS = {
    "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "440": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "411": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    "grey": None,
}
needs_library = pytest.mark.skipif(bool(why_in_full()), reason=f"JPEG files are decoded in full: {why_in_full()}")
# The same examples each time: a run of the tests must not fail by luck.
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def _noise(height, width, seed):
    """Smooth colour fields with noise: chroma that changes from sample to sample."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    fields = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(fields + rng.integers(-40, 40, (height, width, 3)), 0, 255).astype(np.uint8)


def _jpeg(rgb, subsampling="420", *, quality=90, progressive=False, restart=0, orientation=1):
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    flags += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    if SUBSAMPLINGS[subsampling] is None:
        pixels = np.ascontiguousarray(rgb[..., 0])
    else:
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
        pixels = np.ascontiguousarray(rgb[..., ::-1])
    data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


def _oracle(data):
    """What Pillow alone makes of a file, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _taken(monkeypatch):
    """Results of the fast way, in a list that grows."""
    found = []

    def noted(*arguments):
        found.append(decode_jpeg_part(*arguments))
        return found[-1]

    monkeypatch.setattr("runtime.decode.decode_jpeg_part", noted)
    return found


@st.composite
def files_and_parts(draw):
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    orientation = draw(st.integers(1, 8))
    seen = (width, height) if orientation >= 5 else (height, width)
    rows, columns = draw(st.integers(1, seen[0])), draw(st.integers(1, seen[1]))
    part = Part(draw(st.integers(0, seen[0] - rows)), draw(st.integers(0, seen[1] - columns)), rows, columns)
    data = _jpeg(
        _noise(height, width, draw(st.integers(0, 99))),
        draw(st.sampled_from(list(SUBSAMPLINGS))),
        quality=draw(st.integers(1, 100)),
        progressive=draw(st.booleans()),
        restart=draw(st.sampled_from([0, 0, 1, 7])),
        orientation=orientation,
    )
    return data, part


@needs_library
@repeatable
@given(files_and_parts())
def test_any_part_of_any_file_has_pillows_pixels(drawn):
    data, part = drawn
    whole = _oracle(data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        taken = _taken(monkeypatch)
        decoded = decode_part(data, lambda height, width: part)
    np.testing.assert_array_equal(decoded.rgb, part.of(whole))
    assert (decoded.part, decoded.height, decoded.width) == (part, *whole.shape[:2])
    assert len(taken) == 1
    assert taken[0] is not None


@needs_library
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("progressive", [False, True])
def test_middle_of_a_larger_picture_has_pillows_pixels(subsampling, progressive, monkeypatch):
    data = _jpeg(_noise(311, 347, 5), subsampling, progressive=progressive)
    taken = _taken(monkeypatch)
    part = Part(93, 121, 124, 114)
    np.testing.assert_array_equal(decode_part(data, lambda *_: part).rgb, part.of(_oracle(data)))
    np.testing.assert_array_equal(decode_picture(data), _oracle(data))
    assert [found is not None for found in taken] == [True, True]


@needs_library
@pytest.mark.parametrize("form", ["rgb", "mpo", "trailing bytes", "no exif"])
def test_other_plain_forms_are_taken_as_well(form, monkeypatch):
    image, stream = Image.fromarray(_noise(90, 130, 3)), io.BytesIO()
    if form == "mpo":
        image.save(stream, "MPO", save_all=True, append_images=[Image.new("RGB", (130, 90))])
    else:
        image.save(stream, "JPEG", keep_rgb=form == "rgb")
    data = stream.getvalue() + (b"more" if form == "trailing bytes" else b"")
    taken, part = _taken(monkeypatch), Part(40, 50, 20, 30)
    np.testing.assert_array_equal(decode_part(data, lambda *_: part).rgb, part.of(_oracle(data)))
    assert taken[0] is not None


@needs_library
def test_a_path_and_a_file_object_are_taken_as_well(tmp_path, monkeypatch):
    path, part = tmp_path / "a.jpg", Part(40, 50, 20, 30)
    path.write_bytes(_jpeg(_noise(90, 130, 3)))
    taken = _taken(monkeypatch)
    with path.open("rb") as file:
        for source in (path, file):
            found = decode_part(source, lambda *_: part).rgb
            np.testing.assert_array_equal(found, part.of(_oracle(path.read_bytes())))
    assert len(taken) == 2
    assert all(found is not None for found in taken)


# What is left to Pillow


def _cmyk():
    stream = io.BytesIO()
    Image.fromarray(_noise(64, 64, 0)).convert("CMYK").save(stream, "JPEG")
    return stream.getvalue()


def _incomplete_progressive():
    """A progressive file without its last scans, whose coarse coefficients libjpeg smooths."""
    data = _jpeg(_noise(96, 96, 1), progressive=True)
    scans = [index for index in range(len(data) - 1) if data[index : index + 2] == b"\xff\xda"]
    assert len(scans) > 6
    return data[: scans[3]] + b"\xff\xd9"


def _arithmetic():
    data = bytearray(_jpeg(_noise(96, 96, 1)))
    data[data.index(b"\xff\xc0") + 1] = 0xC9
    return bytes(data)


@pytest.mark.parametrize("make", [_cmyk, _incomplete_progressive])
def test_form_whose_pixels_might_differ_is_decoded_in_full(make, monkeypatch):
    data, part = make(), Part(20, 10, 30, 40)
    taken = _taken(monkeypatch)
    np.testing.assert_array_equal(decode_part(data, lambda *_: part).rgb, part.of(_oracle(data)))
    assert [found for found in taken if found is not None] == []


def test_frames_of_other_kinds_are_not_complete():
    assert is_complete(_jpeg(_noise(96, 96, 1)))
    assert is_complete(_jpeg(_noise(96, 96, 1), progressive=True))
    assert not is_complete(_arithmetic())
    assert not is_complete(_incomplete_progressive())


def test_segment_after_the_last_scan_is_left_to_pillow():
    data = _jpeg(_noise(96, 96, 1))
    comment = b"\xff\xfe\x00\x04ab"
    assert is_complete(data[:2] + comment + data[2:])
    assert not is_complete(data[:-2] + comment + data[-2:])


@settings(repeatable, max_examples=40)
@given(st.integers(0, 4000), st.booleans())
@example(0, True)
def test_file_that_ends_early_is_never_complete(length, progressive):
    data = _jpeg(_noise(40, 50, 2), progressive=progressive)
    assume(length < len(data))
    assert not is_complete(data[:length])


@needs_library
@settings(repeatable, max_examples=80)
@given(st.data())
def test_damaged_file_gives_the_same_answer_with_and_without_the_library(data):
    progressive = data.draw(st.booleans())
    file = bytearray(
        _jpeg(_noise(60, 70, 4), "420", progressive=progressive, restart=data.draw(st.sampled_from([0, 3])))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(2, len(file) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del file[data.draw(st.integers(len(file) // 2, len(file) - 1)) :]
    part = lambda height, width: Part(height // 3, width // 3, height - 2 * (height // 3), width - 2 * (width // 3))  # noqa: E731
    answers = []
    for reason in ("", "not now"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("runtime.decode.why_in_full", lambda reason=reason: reason)
            try:
                answers.append(decode_part(bytes(file), part, max_pixels=10**6))
            except PictureError as error:
                answers.append(str(error))
    if isinstance(answers[0], str):
        assert answers[0] == answers[1]
    else:
        np.testing.assert_array_equal(answers[0].rgb, answers[1].rgb)
        assert answers[0][1:] == answers[1][1:]


@needs_library
def test_limit_on_pixels_holds_before_the_library_is_asked(monkeypatch):
    taken = _taken(monkeypatch)
    with pytest.raises(PictureError, match="70x60 pixels, wanted at most 4199 pixels"):
        decode_part(_jpeg(_noise(60, 70, 4)), lambda *_: Part(0, 0, 1, 1), max_pixels=4199)
    assert taken == []


def test_file_that_is_too_long_to_be_read_as_a_whole_is_left_to_pillow(monkeypatch):
    data, taken = _jpeg(_noise(60, 70, 4)), _taken(monkeypatch)
    monkeypatch.setattr("runtime.decode._MAX_JPEG_BYTES", len(data) - 1)
    np.testing.assert_array_equal(decode_part(data, lambda *_: Part(0, 0, 60, 70)).rgb, _oracle(data))
    assert taken == []


# Where the library is, or why it is not


@pytest.fixture
def looked_again():
    for cached in (find_turbojpeg, why_in_full):
        cached.cache_clear()
    yield
    for cached in (find_turbojpeg, why_in_full):
        cached.cache_clear()


def test_library_that_is_too_old_is_passed_over_and_named(monkeypatch, looked_again):
    monkeypatch.setattr("runtime.turbojpeg._candidates", lambda: iter(["libold.so", "libgone.so"]))

    def opened(path):
        if path == "libgone.so":
            raise OSError(path)
        return SimpleNamespace(tj3Init=lambda: None)

    monkeypatch.setattr(ctypes, "CDLL", opened)
    assert find_turbojpeg().path is None
    assert why_in_full() == "libold.so is older than libjpeg-turbo 3"


def test_no_library_is_said_and_the_picture_is_decoded_in_full(monkeypatch, looked_again):
    monkeypatch.setattr("runtime.turbojpeg._candidates", lambda: iter([]))
    data = _jpeg(_noise(60, 70, 4))
    assert why_in_full() == "no libjpeg-turbo 3 was found"
    np.testing.assert_array_equal(decode_picture(data), _oracle(data))


@pytest.mark.parametrize(("version", "other"), [(None, True), ("1.5.3", True), ("2.1.5", False), ("3.2.0", False)])
def test_pillow_of_another_jpeg_library_decides_against_it(monkeypatch, looked_again, version, other):
    monkeypatch.setattr(runtime.jpeg_region.features, "version_feature", lambda name: version)
    assert why_in_full().startswith("Pillow was built without libjpeg-turbo") is other


@needs_library
def test_detector_never_loads_a_plain_jpeg_as_a_whole(tiny_bundle, tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    path.write_bytes(_jpeg(_noise(300, 400, 6), orientation=6))
    middle = decode_picture(path)[192:208, 142:158]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded in full"))
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        found, expected = detector.predict([path, middle])
    assert found.error is None
    assert found.fake_probability == pytest.approx(expected.fake_probability, abs=1e-6)
