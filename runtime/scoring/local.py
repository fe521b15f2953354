"""A collection scored by one detector in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from runtime.detector import Detector
from runtime.scoring.listing import picture_from_line
from runtime.scoring.rows import Row, rows_of
from runtime.scoring.sources import Picture
from runtime.scoring.work import Work


def score_locally(
    work: Work, detector: Detector, base: str, *, batch_size: int, advance: Callable[[int, int], None]
) -> None:
    """Rows of every part that is missing, kept part by part.

    Args:
        work: begun.
        detector: that scores.
        base: folder that relative paths start from.
        batch_size: pictures scored at once.
        advance: told of rows and of failed ones among them as they come.

    Raises:
        CollectionError: a shard is not any more what was listed, or a part cannot be written.
    """
    missing = work.missing()

    def pictures() -> Iterator[Picture]:
        for _, lines in work.listed(missing):
            yield from map(picture_from_line, lines)

    def counted() -> Iterator[Row]:
        for row in rows_of(detector, pictures(), base, batch_size=batch_size):
            advance(1, int(row.error is not None))
            yield row

    # One stream over all parts: reading, decoding and scoring overlap across their borders.
    rows = counted()
    for number in sorted(missing):
        work.commit(number, islice(rows, work.part_length(number)))
