"""Tar shards of labelled pictures, in the layout of webdataset, read at any offset.

A shard is an uncompressed tar file. Members whose names agree up to the first dot belong together: the picture
(`000001.jpg`) and either `000001.json`, with `label` and optionally `path`, `generator`, `family`, `original_id`,
`split` and `sha256`, or `000001.cls`, the label alone. Where no split is given, a shard called `train-...`, `val-...`
or `test-...` gives it. `shards.json`, which `train.shards` writes, lists the shards with their lengths.

A picture is read by its offset, so shards serve batches in any order: the same ones as from a folder, with any number
of workers and after any resume.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from runtime.decode import PICTURE_SUFFIXES
from train.data_csv import SPLIT_WORDS, summary
from train.errors import DataError
from train.pictures import PictureRecord, PictureSet, ShardMember

SHARD_SUFFIX = ".tar"
INDEX_FILE = "shards.json"
LABEL_SUFFIXES = (".json", ".cls")
BLOCK_BYTES = 512
TEXT_FIELDS = ("path", "generator", "family", "original_id", "split", "sha256")
_AGAIN = "copy the shards again, or write them again with python -m train.shards"
WANTED = "uncompressed tar shards of pictures, each beside a .json with its label or a .cls"


@dataclass
class _Sample:
    """Members that share a key."""

    picture: tarfile.TarInfo | None = None
    described: dict[str, Any] = field(default_factory=dict)


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder holds shards: an index, or tar files and no folder beside them."""
    if not folder.is_dir():
        return False
    if (folder / INDEX_FILE).is_file():
        return True
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return any(e.name.endswith(SHARD_SUFFIX) for e in shown) and not any(e.is_dir() for e in shown)


def read_shards(source: Path) -> PictureSet:
    """All labelled pictures of a folder of shards, or of one shard.

    Args:
        source: absolute path of the folder or of the tar file.

    Raises:
        DataError: a shard is missing, truncated, damaged or compressed, or a picture has no usable label.
    """
    root = source if source.is_dir() else source.parent
    shards = sorted(path for path in source.iterdir() if _is_shard(path)) if source.is_dir() else [source]
    if source.is_dir():
        _compare_with_index(root, shards)
    records: list[PictureRecord] = []
    skipped = 0
    for shard in shards:
        found, others = _records_of(shard, root)
        records += found
        skipped += others
    if not records:
        raise DataError(str(source), got="shards without a picture", wanted=WANTED, remedy="check the path")
    return PictureSet(root, "tar shards", tuple(records), skipped)


def _is_shard(path: Path) -> bool:
    return path.suffix == SHARD_SUFFIX and not path.name.startswith(".") and path.is_file()


def _compare_with_index(root: Path, shards: list[Path]) -> None:
    index = root / INDEX_FILE
    if not index.is_file():
        return
    try:
        listed = {str(entry["name"]): int(entry["size_bytes"]) for entry in json.loads(index.read_text())["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            str(index), got=f"no list of shards ({error!r})", wanted="the file that train.shards wrote", remedy=_AGAIN
        ) from error
    found = {path.name: path.stat().st_size for path in shards}
    problems = [f"{name} is not there" for name in listed if name not in found]
    problems += [f"{name} is not listed" for name in found if name not in listed]
    problems += [
        f"{name} has {found[name]:,} of {size:,} bytes"
        for name, size in listed.items()
        if found.get(name, size) != size
    ]
    if problems:
        raise DataError(
            f"shards in {root}", got=summary(problems), wanted=f"the shards that {INDEX_FILE} lists", remedy=_AGAIN
        )


def _records_of(shard: Path, root: Path) -> tuple[list[PictureRecord], int]:
    """Pictures of one shard in their order, and how many of its members are of no use here."""
    samples, others = _samples_of(shard)
    records, problems = [], []
    for key, sample in samples.items():
        if sample.picture is None:
            others += 1
            continue
        complaint = _complaint(sample.described)
        if complaint:
            problems.append(f"{key}: {complaint}")
        else:
            records.append(_record(sample.picture, sample.described, shard, root))
    if problems:
        raise DataError(f"shard {shard}", got=summary(problems), wanted=WANTED, remedy="write the shards again")
    return records, others


def _samples_of(shard: Path) -> tuple[dict[str, _Sample], int]:
    samples: dict[str, _Sample] = {}
    others = 0
    try:
        # Opened here: tarfile reads headers and seeks over the pictures.
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end = 0
            for info in tar:
                end = info.offset_data + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
                others += not _add(samples, info, stream)
            _require_end(stream, end, shard)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"shard {shard}",
            got=f"a file that cannot be read as tar ({error})",
            wanted="a whole, uncompressed tar file",
            remedy=_AGAIN,
        ) from error
    return samples, others


def _add(samples: dict[str, _Sample], info: tarfile.TarInfo, stream: BinaryIO) -> bool:
    """Put a member where it belongs; False for one that is of no use here."""
    if not info.isfile():
        return info.isdir()
    place = PurePosixPath(info.name)
    key = str(place.with_name(place.name.partition(".")[0]))
    suffix = place.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        sample = samples.setdefault(key, _Sample())
        if sample.picture is not None:
            raise ValueError(f"{info.name} and {sample.picture.name} are two pictures of one key")
        sample.picture = info
    elif suffix in LABEL_SUFFIXES:
        stream.seek(info.offset_data)
        text = stream.read(info.size).decode("utf-8")
        described = {"label": int(text)} if suffix == ".cls" else json.loads(text)
        if not isinstance(described, dict):
            raise ValueError(f"{info.name} is no JSON object")
        sample = samples.setdefault(key, _Sample())
        sample.described = described | sample.described
    else:
        return False
    return True


def _require_end(stream: BinaryIO, end: int, shard: Path) -> None:
    """A tar file ends with two blocks of zeros; anything else there is damage that tarfile takes for the end."""
    stream.seek(end)
    tail = stream.read(2 * BLOCK_BYTES)
    if len(tail) < 2 * BLOCK_BYTES or any(tail):
        raise DataError(
            f"shard {shard}",
            got=f"a file that is cut short or damaged behind byte {end:,} of {shard.stat().st_size:,}",
            wanted="a whole tar file, which ends with two blocks of zeros",
            remedy=_AGAIN,
        )


def _complaint(described: dict[str, Any]) -> str | None:
    """Why a picture cannot be used, or None."""
    label = described.get("label")
    if label is None:
        return "no label beside it"
    if isinstance(label, bool) or label not in (0, 1):
        return f"label {label!r} is neither 0 (real) nor 1 (fake)"
    wrong = [key for key in TEXT_FIELDS if described.get(key) is not None and not isinstance(described[key], str)]
    if wrong:
        return f"{wrong[0]} is {described[wrong[0]]!r}, wanted text"
    split = described.get("split")
    if split and split.lower() not in SPLIT_WORDS:
        return f"split {split!r} is none of {', '.join(SPLIT_WORDS)}"
    return None


def _record(info: tarfile.TarInfo, described: dict[str, Any], shard: Path, root: Path) -> PictureRecord:
    def text(key: str) -> str:
        return described.get(key) or ""

    relative = text("path") or f"{shard.stem}/{info.name}"
    generator = text("generator") or root.name
    return PictureRecord(
        path=Path(os.path.abspath(root / relative)),
        label=int(described["label"]),
        generator=generator,
        family=text("family") or generator,
        original_id=text("original_id") or relative,
        split=SPLIT_WORDS.get(text("split").lower() or shard.stem.replace("_", "-").partition("-")[0].lower()),
        member=ShardMember(shard, info.name, info.offset_data, info.size, text("sha256")),
    )
