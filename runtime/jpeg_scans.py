"""How many scans a progressive JPEG file has: a hundred bytes can be another pass over every block of a large picture.

Pillow and libjpeg read as many as there are, so each MiB of such a file can keep a thread busy for minutes.
"""

from __future__ import annotations

import re

# As libtiff allows (LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER). Encoders write ten or so.
MOST_SCANS = 100
# Tables and the like between scans; a file may have some for each.
_MOST_SEGMENTS = 10_000

# As libjpeg looks for the next marker: over whatever is no marker, and over restarts (T.81, B.1.1.2).
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"


def has_too_many_scans(data: bytes) -> bool:
    """Whether the first picture in a JPEG file has more than `MOST_SCANS` scans, or segments beyond reason.

    Args:
        data: the file; what follows the end of the first picture is not looked at.
    """
    scans, position = 0, 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or found[1] == _END_OF_IMAGE:
            return False
        scans += found[1] == _START_OF_SCAN
        if scans > MOST_SCANS:
            return True
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return True
