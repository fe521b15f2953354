"""Write tar shards of a picture collection: `python -m train.shards --data DIR --out DIR --shard-mb 256`.

Few large files instead of many small ones: what network file systems and object stores want. The shards have
webdataset's layout (`000001.jpg` beside `000001.json`), so its tools read them too; `--data` of training, evaluation
and audit reads them at any offset (see `train.data_shards`). The set keeps its content hash. The pictures' own bytes
are stored, never re-encoded; the same collection gives the same shards to the byte.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from runtime.errors import NTFError
from runtime.strict_json import canonical_json
from train.checkpoint import write_atomically
from train.data import scan_pictures
from train.data_shards import INDEX_FILE, SHARD_SUFFIX
from train.errors import ConfigError
from train.folders import new_folder
from train.integrity import checked
from train.pictures import CorruptPolicy, PictureRecord, PictureSet, relative_path

UNSPLIT = "all"
BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class Options:
    """Write tar shards of a picture collection."""

    data: Path
    """Folder, CSV file or JSON list with labelled pictures."""
    out: Path
    """Folder to make; it must not hold anything yet."""
    shard_mb: int = 256
    """Size in megabytes after which the next shard begins."""
    corrupt: CorruptPolicy = "refuse"
    """Refuse a collection with pictures that cannot be decoded, or leave them out and list them in shards.json."""
    workers: int = 0
    """Threads that check the pictures."""
    progress: bool = True
    """Show progress bars."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m train.shards", args=arguments)
    try:
        pictures = scan_pictures(options.data, require_both=False)
        print(pictures.describe(), flush=True)
        pictures = checked(pictures, corrupt=options.corrupt, workers=options.workers, progress=options.progress)
        shards = write_shards(pictures, options.out, shard_mb=options.shard_mb, progress=options.progress)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(pictures):,} pictures into {len(shards):,} shards in {options.out}")
    return 0


def write_shards(pictures: PictureSet, out: Path, *, shard_mb: int = 256, progress: bool = False) -> list[Path]:
    """Shards of every split, and `shards.json`, in a new folder.

    Args:
        pictures: what to write, in its order.
        out: folder that is not there yet, or is empty; it appears only when everything is written.
        shard_mb: size in megabytes after which the next shard begins, at least 1.
        progress: show a progress bar.

    Raises:
        ConfigError: the folder is taken, or the size makes no sense.
        NTFError: a picture cannot be read.
    """
    if shard_mb < 1:
        raise ConfigError("--shard-mb", got=str(shard_mb), wanted="1 or more", remedy="change this option")
    with new_folder(out) as building:
        records = track(pictures.records, "writing", disable=not progress)
        shards = _write_all(records, pictures.root, building, shard_mb * BYTES_PER_MB)
        write_atomically(building / INDEX_FILE, canonical_json(_index(pictures, shards)).encode())
    return [out / shard.name for shard in shards]


def _write_all(records: Iterable[PictureRecord], root: Path, folder: Path, limit_bytes: int) -> list[Path]:
    """Shards of up to about `limit_bytes`; each split has its own, in the order of its records."""
    writers: dict[str, tarfile.TarFile] = {}
    paths: list[Path] = []
    counts: dict[str, int] = {}
    try:
        for number, record in enumerate(records):
            split = record.split or UNSPLIT
            writer = writers.get(split)
            if writer is not None and writer.offset >= limit_bytes:
                writer.close()
                writer = None
            if writer is None:
                counts[split] = counts.get(split, -1) + 1
                paths.append(folder / f"{split}-{counts[split]:06d}{SHARD_SUFFIX}")
                writer = writers[split] = tarfile.open(paths[-1], "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            _write_picture(writer, record, number, root)
    finally:
        for writer in writers.values():
            writer.close()
    return sorted(paths)


def _write_picture(writer: tarfile.TarFile, record: PictureRecord, number: int, root: Path) -> None:
    data = record.read_bytes()
    described = {
        "path": relative_path(record.path, root),
        "label": record.label,
        "generator": record.generator,
        "family": record.family,
        "original_id": record.original_id,
        "split": record.split,
        "sha256": replace(record, sha256="").digest(data),
    }
    suffix = record.path.suffix.lower()
    for name, content in (
        (f"{number:06d}{suffix}", data),
        (f"{number:06d}.json", json.dumps(described, sort_keys=True).encode()),
    ):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        writer.addfile(info, io.BytesIO(content))


def _index(pictures: PictureSet, shards: list[Path]) -> dict[str, Any]:
    return {
        "pictures": len(pictures),
        "corrupt": [asdict(picture) for picture in pictures.corrupt],
        "shards": [{"name": path.name, "size_bytes": path.stat().st_size} for path in shards],
    }


if __name__ == "__main__":
    sys.exit(main())
