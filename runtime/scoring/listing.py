"""A collection written down once: a line for each picture, so that work is dealt by number and memory stays flat."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from runtime.scoring.sources import Picture
from runtime.scoring.tar_shards import Member


@dataclass(frozen=True)
class ListingSpec:
    """What a listing holds.

    Args:
        pictures: how many.
        sha256: of its text: names, order and, in shards, places.
    """

    pictures: int
    sha256: str


def write_listing(path: Path, pictures: Iterable[Picture]) -> ListingSpec:
    """Writes a listing, of which nothing but the current line is in memory.

    Args:
        path: file to write; it is on the disk when this returns.
        pictures: in the order of their rows.
    """
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for picture in pictures:
            line = f"{picture_to_line(picture)}\n".encode()
            digest.update(line)
            file.write(line)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return ListingSpec(count, digest.hexdigest())


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a listing, without their ends."""
    with path.open("rb") as file:
        for line in file:
            yield line.decode().rstrip("\n")


def parts_of(path: Path, part_size: int, wanted: Container[int]) -> Iterator[tuple[int, Iterator[str]]]:
    """Number and lines of each wanted part: pictures [number * part_size, (number + 1) * part_size).

    Args:
        path: the listing.
        part_size: pictures of a part; the last one may have fewer.
        wanted: numbers of parts.
    """
    numbered = ((place // part_size, line) for place, line in enumerate(lines_of(path)))
    for number, group in groupby(numbered, key=lambda pair: pair[0]):
        if number in wanted:
            yield number, (line for _, line in group)


def picture_to_line(picture: Picture) -> str:
    """One line of ASCII JSON: [name], or [name, shard, member, offset, size]."""
    member = picture.member
    place = [] if member is None else [picture.shard, member.name, member.offset, member.size_bytes]
    return json.dumps([picture.name, *place])


def picture_from_line(line: str) -> Picture:
    """Picture of a line that `picture_to_line` wrote."""
    name, *place = json.loads(line)
    if not place:
        return Picture(name)
    shard, member, offset, size_bytes = place
    return Picture(name, shard, Member(member, offset, size_bytes))
