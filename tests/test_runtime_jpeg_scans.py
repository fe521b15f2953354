"""Progressive JPEG files whose scans pass over a picture again and again, for a hundred bytes each."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import photograph
from runtime.decode import decode_picture
from runtime.errors import PictureError
from runtime.jpeg_scans import MOST_SCANS, has_too_many_scans


def progressive(image=None):
    stream = io.BytesIO()
    (image or Image.fromarray(photograph(40, 32))).save(stream, "JPEG", progressive=True)
    return stream.getvalue()


def with_scans(count, between=b""):
    """A file that has so many scans: the last one of its own, again and again."""
    data = progressive(Image.new("L", (64, 64), 77))
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    return data[: starts[-1]] + (between + data[starts[-1] : -2]) * (count - len(starts) + 1) + data[-2:]


def test_files_of_encoders_are_read():
    assert not has_too_many_scans(progressive())
    assert decode_picture(progressive()).shape == (40, 32, 3)


@pytest.mark.parametrize("between", [b"", b"junk", b"\xff\xff\xff", b"\xff\xd0", b"\xff\xfe\x00\x04ab"])
def test_more_scans_than_pictures_have_are_refused_whatever_lies_between(between, tmp_path):
    assert decode_picture(with_scans(MOST_SCANS)).shape == (64, 64, 3)
    data = with_scans(MOST_SCANS + 1, between)
    (tmp_path / "scans.jpg").write_bytes(data)
    for source in (data, tmp_path / "scans.jpg"):
        with pytest.raises(PictureError, match=f"got more scans than pictures have, wanted at most {MOST_SCANS}"):
            decode_picture(source)


def test_segments_without_end_are_too_many():
    data = with_scans(6)
    place = data.index(b"\xff\xda")
    assert has_too_many_scans(data[:place] + b"\xff\xfe\x00\x02" * 20_000 + data[place:])


def test_what_follows_the_first_picture_is_not_looked_at():
    data = progressive() + with_scans(MOST_SCANS + 1)
    np.testing.assert_array_equal(decode_picture(data), decode_picture(progressive()))


def test_file_that_breaks_off_is_left_to_the_decoder():
    for length in (2, 3, 20, len(progressive()) - 2):
        assert not has_too_many_scans(progressive()[:length])
