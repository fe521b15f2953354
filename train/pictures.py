"""Labelled pictures and sets of them: where the bytes lie, what they hash to, how they become pixels."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.decode import decode_picture
from runtime.errors import PictureError
from train.data_csv import SPLIT_WORDS
from train.equalize import EqualizeConfig, equalized_jpeg
from train.errors import DataError

# What to do where pictures cannot be decoded: refuse the collection, or leave them out and list them.
CorruptPolicy = Literal["refuse", "skip"]


@dataclass(frozen=True)
class ShardMember:
    """Where a picture lies in an uncompressed tar file.

    Attributes:
        shard: the tar file.
        name: of the member.
        offset: of its first byte.
        size_bytes: its length.
        sha256: of its content as it was written; empty where the shard does not say.
    """

    shard: Path
    name: str
    offset: int
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class PictureRecord:
    """One labelled picture.

    Attributes:
        path: absolute path of the file; in shards, the path it would have in a folder.
        label: 0 real, 1 fake.
        generator: the set it is evaluated with.
        family: family of the generator; the generator's name where it is not known.
        original_id: picture it was cropped or made from; pictures that share it are resampled together.
        split: `train`, `val`, `test`, or None where the collection has no splits.
        member: where it lies in a shard; None for a file of its own.
        equalize: what is done to it before anything else; None for nothing.
        sha256: of its bytes where they were read before; empty otherwise.
    """

    path: Path
    label: int
    generator: str
    family: str
    original_id: str
    split: str | None
    member: ShardMember | None = None
    equalize: EqualizeConfig | None = None
    sha256: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """What an error message calls it."""
        return str(self.path) if self.member is None else f"{self.member.name} of {self.member.shard} ({self.path})"

    def read_bytes(self) -> bytes:
        """Content of the file or of the shard's member.

        Raises:
            PictureError: it cannot be read.
            DataError: the shard ends before the picture does.
        """
        try:
            if self.member is None:
                return self.path.read_bytes()
            with self.member.shard.open("rb") as stream:
                stream.seek(self.member.offset)
                data = stream.read(self.member.size_bytes)
        except OSError as error:
            raise PictureError(
                self.name,
                got=f"a file that cannot be read ({error.strerror or error})",
                wanted="a readable file",
                remedy="check that it is there, and its permissions",
            ) from error
        if len(data) < self.member.size_bytes:
            raise self._damaged(f"{len(data):,} bytes", f"{self.member.size_bytes:,} bytes")
        return data

    def content_sha256(self) -> str:
        """Hex digest of its bytes, from an earlier reading where there was one.

        Raises:
            DataError: a shard holds other bytes than were written.
        """
        return self.sha256 or self.digest(self.read_bytes())

    def digest(self, data: bytes) -> str:
        """Hex digest of `data`, which `read_bytes` gave.

        Raises:
            DataError: a shard holds other bytes than were written.
        """
        found = hashlib.sha256(data).hexdigest()
        if self.member is not None and self.member.sha256 not in ("", found):
            raise self._damaged(f"bytes with sha256 {found[:12]}", f"{self.member.sha256[:12]}, as it was written")
        return found

    def _damaged(self, got: str, wanted: str) -> DataError:
        return DataError(self.name, got=got, wanted=wanted, remedy="the shard is damaged: copy or write it again")


class _NamedBytes(io.BytesIO):
    """Bytes that errors call by the picture's name."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def load_pixels(record: PictureRecord) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) uint8 of a picture, equalised where the record says so.

    Raises:
        PictureError: it cannot be decoded.
        DataError: the shard is damaged, or the picture is smaller than the equalised crop.
    """
    if record.member is None and record.equalize is None:
        return decode_picture(record.path)
    data = record.read_bytes()
    if record.equalize is None:
        return pixels_of(record, data)
    return decode_picture(equalized_bytes(record, data, pixels_of(record, data), record.equalize))


def pixels_of(record: PictureRecord, data: bytes) -> NDArray[np.uint8]:
    """RGB pixels of the bytes that a record's `read_bytes` gave, as they are stored.

    Raises:
        PictureError: they cannot be decoded.
    """
    return decode_picture(_NamedBytes(data, record.name))


def equalized_bytes(record: PictureRecord, data: bytes, rgb: NDArray[np.uint8], config: EqualizeConfig) -> bytes:
    """The JPEG file that takes a picture's place.

    Args:
        record: the picture.
        data: its bytes.
        rgb: its pixels.
        config: what to do.

    Raises:
        DataError: the picture is smaller than the crop, or its shard is damaged.
    """
    key = record.sha256 or record.digest(data)
    return equalized_jpeg(rgb, config, key=key, name=record.name)


@dataclass(frozen=True)
class CorruptPicture:
    """A picture that was left out because it cannot be decoded.

    Attributes:
        path: relative to the collection.
        label: 0 real, 1 fake.
        generator: its set.
        split: its split, or None.
        reason: what is wrong with it.
    """

    path: str
    label: int
    generator: str
    split: str | None
    reason: str


@dataclass(frozen=True)
class PictureSet:
    """Records in the order of their relative paths (folders), of their rows (lists) or as they were written (shards).

    Attributes:
        root: folder that relative paths count from.
        layout: how the labels were found, for the reader.
        records: the pictures.
        skipped: files that stand among the pictures and have no picture suffix.
        corrupt: pictures that were left out because they cannot be decoded.
    """

    root: Path
    layout: str
    records: tuple[PictureRecord, ...]
    skipped: int = 0
    corrupt: tuple[CorruptPicture, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def split(self, name: str) -> PictureSet:
        """The records of one split.

        Raises:
            DataError: there is no picture of that split.
        """
        wanted = SPLIT_WORDS.get(name, name)
        records = tuple(r for r in self.records if r.split == wanted)
        if not records:
            present = sorted({str(r.split) for r in self.records if r.split is not None})
            raise DataError(
                f"split {name!r} of {self.root}",
                got=f"no picture of it; splits there: {', '.join(present) or 'none'}",
                wanted=f"pictures under {self.root / wanted} or rows with split={wanted}",
                remedy="name one of the splits that are there, or pass the folder that holds them",
            )
        corrupt = tuple(picture for picture in self.corrupt if picture.split == wanted)
        return replace(self, records=records, corrupt=corrupt)

    def describe(self) -> str:
        """A table of what was found, one row per split and generator."""
        reals = sum(r.label == 0 for r in self.records)
        head = f"{self.root} ({self.layout}): {len(self):,} pictures, {reals:,} real, {len(self) - reals:,} fake"
        if self.skipped:
            head += f"; {self.skipped:,} other files left out"
        if self.corrupt:
            head += f"; {len(self.corrupt):,} corrupt pictures left out"
        return "\n".join([head, *_table(self.records)])

    def content_sha256(self) -> str:
        """Hex digest over relative paths, labels and file bytes, independent of the records' order."""
        lines = sorted(f"{relative_path(r.path, self.root)}\0{r.label}\0{r.content_sha256()}" for r in self.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _table(records: Iterable[PictureRecord]) -> list[str]:
    groups: dict[tuple[str, str, str], list[PictureRecord]] = {}
    for r in records:
        groups.setdefault((r.split or "-", r.generator, r.family), []).append(r)
    rows = [("split", "generator", "family", "real", "fake", "originals")]
    for key, members in sorted(groups.items()):
        fakes = sum(r.label for r in members)
        originals = len({r.original_id for r in members})
        rows.append((*key, f"{len(members) - fakes:,}", f"{fakes:,}", f"{originals:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def relative_path(path: Path, root: Path) -> str:
    """POSIX path of a picture as its collection's hash names it."""
    return Path(os.path.relpath(path, root)).as_posix()
