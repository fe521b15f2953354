"""Pictures of a collection to rows, one for each, in order."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from runtime.decode import PictureSource
from runtime.detector import Detection, Detector
from runtime.scoring.sources import Picture
from runtime.scoring.tar_shards import member_part


class Row(NamedTuple):
    """What is written of one picture; either `error` is None or the other three after `source` are not.

    Args:
        source: name of the picture as the collection has it; bytes that are not UTF-8 are escaped by a backslash.
        verdict: "real", "uncertain" or "fake".
        fake_probability: calibrated probability of being generated, 0 to 1.
        trace_similarity: cosine with the mean natural trace, -1 to 1.
        error: why there is no verdict, in one sentence.
    """

    source: str
    verdict: str | None
    fake_probability: float | None
    trace_similarity: float | None
    error: str | None


COLUMNS = Row._fields


def rows_of(detector: Detector, pictures: Iterable[Picture], base: str, *, batch_size: int) -> Iterator[Row]:
    """A row for each picture; they are read while rows are taken.

    Args:
        detector: that scores them.
        pictures: of a collection.
        base: folder that its relative paths start from.
        batch_size: pictures scored at once.

    Raises:
        CollectionError: a shard is not any more what was listed.

    Note:
        A file is read when one of the detector's threads decodes it, so that no more of them are in memory than it has
        threads, however many pictures it takes ahead.
    """
    names: deque[str] = deque()

    def sources() -> Iterator[PictureSource]:
        for picture in pictures:
            source = _source(picture, base)
            names.append(row_name(picture))
            yield source

    for detection in detector.stream(sources(), batch_size=batch_size):
        yield _row(names.popleft(), detection)


def row_to_line(row: Row) -> str:
    """One line of ASCII JSON with the names of the columns."""
    return json.dumps(row._asdict(), allow_nan=False)


def row_from_line(line: str) -> Row:
    """Row of a line that `row_to_line` wrote.

    Raises:
        ValueError: the line is something else.
    """
    cells = json.loads(line)
    if not isinstance(cells, dict) or tuple(cells) != COLUMNS:
        raise ValueError(f"{line[:80]!r} is no row")
    return Row(**cells)


def row_name(picture: Picture) -> str:
    """`source` of a picture's row."""
    return _valid_text(picture.name)


def _source(picture: Picture, base: str) -> PictureSource:
    if picture.member is None:
        return os.path.join(base, picture.name)
    return member_part(os.path.join(base, picture.shard or ""), picture.member)


def _row(name: str, detection: Detection) -> Row:
    error = None if detection.error is None else _valid_text(detection.error)
    return Row(name, detection.verdict, detection.fake_probability, detection.trace_similarity, error)


def _valid_text(text: str) -> str:
    # A file's name may hold bytes that are no UTF-8, which Parquet and other readers of JSON refuse.
    return text.encode("utf-8", "backslashreplace").decode()
