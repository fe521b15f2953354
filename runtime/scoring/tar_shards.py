"""Pictures in tar shards, found by their headers and read in place: nothing is ever unpacked.

A member's name is a label and never a path. The layout is webdataset's: uncompressed tar files in which pictures lie
beside other files of the same key, which are of no interest here.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from runtime.errors import CollectionError
from runtime.file_part import FilePart
from runtime.picture_paths import is_picture_name

SHARD_SUFFIX = ".tar"

_BLOCK_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """One picture in a shard.

    Args:
        name: of the member.
        offset: of its first byte in the shard.
        size_bytes: of its content.
    """

    name: str
    offset: int
    size_bytes: int


def pictures_in_shard(shard: str) -> Iterator[Member]:
    """Members of a shard with a picture's name, in their order; only headers are read.

    Args:
        shard: path of an uncompressed tar file.

    Raises:
        CollectionError: the file cannot be read, is no tar file, is cut short or damaged, or holds a picture's name
            that leaves the archive or belongs to a link or another special file.
    """
    try:
        # Opened here, and without a mode that looks for compression: offsets are those of the file.
        with open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if is_picture_name(os.path.basename(info.name)) and not info.isdir():
                    _require_plain(shard, info)
                    yield Member(info.name, info.offset_data, info.size)
            _require_end(shard, stream, archive.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        _refuse(shard, f"a file that cannot be read as tar ({error})", "a whole, uncompressed tar file")


def member_part(shard: str, member: Member) -> FilePart:
    """A member as a source of a detector, which reads it when it decodes it.

    Raises:
        CollectionError: the shard is not there any more, or is shorter than it was.
    """
    try:
        size_bytes = os.stat(shard).st_size
    except OSError as error:
        _refuse(shard, f"a file that cannot be read ({error.strerror})", "the shard as it was listed")
    if size_bytes < member.offset + member.size_bytes:
        _refuse(shard, f"a file that ends within {member.name!r}", "the shard as it was listed")
    return FilePart(member.name, shard, member.offset, member.size_bytes)


def _require_plain(shard: str, info: tarfile.TarInfo) -> None:
    name = info.name
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        _refuse(shard, f"the name {name!r}", "names inside the archive", "do not use this shard")
    if not info.isreg() or info.issparse():
        _refuse(shard, f"{name!r}, which is a link or another special file", "regular files", "store the file itself")


def _require_end(shard: str, stream: BinaryIO, end: int) -> None:
    """Nothing where two blocks of zeros follow; tarfile takes anything else there for the end, and stops in silence."""
    stream.seek(end)
    tail = stream.read(2 * _BLOCK_BYTES)
    if len(tail) < 2 * _BLOCK_BYTES or any(tail):
        _refuse(shard, f"a file that is cut short or damaged behind byte {end}", "two blocks of zeros at its end")


def _refuse(shard: str, got: str, wanted: str, remedy: str = "write or copy the shard again") -> NoReturn:
    raise CollectionError(shard, got=got, wanted=wanted, remedy=remedy)
