"""Which pictures a collection names: a folder, a list, a table with a column of paths, or tar shards."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from runtime.decode import PICTURE_SUFFIXES
from runtime.errors import CollectionError, UsageError
from runtime.picture_paths import files_below, is_picture_name
from runtime.scoring.parquet import import_parquet
from runtime.scoring.tar_shards import SHARD_SUFFIX, Member, pictures_in_shard

LIST_SUFFIXES = (".txt", ".lst", ".list")
TABLE_SUFFIXES = (".csv", ".parquet")
DEFAULT_COLUMN = "path"

_LISTED = LIST_SUFFIXES + TABLE_SUFFIXES
_WANTED = f"a folder, list ({', '.join(LIST_SUFFIXES)}), table ({', '.join(TABLE_SUFFIXES)}) or {SHARD_SUFFIX} file"


@dataclass(frozen=True)
class Picture:
    """One picture of a collection.

    Args:
        name: what its row is called: the path as the collection names it, or "SHARD/MEMBER".
        shard: path of the tar file that holds it, as the collection names it; None for a file of its own.
        member: where it lies in the shard.
    """

    name: str
    shard: str | None = None
    member: Member | None = None


def base_folder(source: str) -> str:
    """Absolute folder that relative paths of a collection start from: the list's own, else the current one."""
    is_list = _suffix(source) in _LISTED and not os.path.isdir(source)
    return os.path.dirname(os.path.abspath(source)) if is_list else os.getcwd()


def pictures_of(source: str, *, column: str = DEFAULT_COLUMN) -> Iterator[Picture]:
    """Pictures of a collection in a fixed order, found while they are asked for.

    Args:
        source: a folder, searched with all below it, hidden names left out; a text file with a path in each line,
            blank lines left out; a CSV or Parquet table; or a tar file. A shard that a folder, list or table holds
            stands for the pictures in it.
        column: of a table, that holds the paths.

    Raises:
        UsageError: there is no such source, it is of no known kind, or the table has no such column.
        CollectionError: a shard, a list or a table is damaged, or a row has no path.
    """
    if os.path.isdir(source):
        return _expanded(files_below(source, _is_wanted), base_folder(source))
    if not os.path.exists(source):
        _refuse_source(source, "nothing there")
    suffix = _suffix(source)
    if suffix == SHARD_SUFFIX:
        return _expanded(iter([source]), base_folder(source))
    if suffix not in _LISTED:
        _refuse_source(source, f"a file ending in {suffix!r}")
    paths = {".csv": _csv_paths, ".parquet": _parquet_paths}.get(suffix, _text_paths)(source, column)
    return _expanded(paths, base_folder(source))


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _is_wanted(name: str) -> bool:
    return is_picture_name(name) or _suffix(name) == SHARD_SUFFIX


def _expanded(paths: Iterator[str], base: str) -> Iterator[Picture]:
    """A picture for each path, and for each member of a path that is a shard."""
    for path in paths:
        if _suffix(path) != SHARD_SUFFIX:
            yield Picture(path)
            continue
        for member in pictures_in_shard(os.path.join(base, path)):
            yield Picture(f"{path}/{member.name}", path, member)


def _text_paths(source: str, _: str) -> Iterator[str]:
    # A file's name may be any bytes; those that are not UTF-8 come through as they are.
    with _readable(source), open(source, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if path := line.rstrip("\r\n"):
                yield path


def _csv_paths(source: str, column: str) -> Iterator[str]:
    with _readable(source), open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.DictReader(file)
        _require_column(source, column, list(table.fieldnames or ()))
        for row in table:
            yield _path_of(source, table.line_num, row[column])


def _parquet_paths(source: str, column: str) -> Iterator[str]:
    parquet = import_parquet(source)
    with _readable(source), parquet.ParquetFile(source) as table:
        _require_column(source, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _path_of(source, number, value)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """What reading a damaged list or table raises, as a CollectionError."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors derive from the first two
        got = f"a file that cannot be read ({error})"
        raise CollectionError(source, got=got, wanted="a whole list or table", remedy="write the file again") from error


def _path_of(source: str, row: int, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise CollectionError(
            f"{source}, row {row}", got=repr(value), wanted="the path of a picture", remedy="fill in or remove the row"
        )
    return value


def _require_column(source: str, column: str, found: list[str]) -> None:
    if column not in found:
        raise UsageError(
            f"--column {column}",
            got=f"the columns {', '.join(map(repr, found)) or 'none'} in {source}",
            wanted="one of them",
            remedy="name the column that holds the paths",
        )


def _refuse_source(source: str, got: str) -> NoReturn:
    compressed = " Compressed tar files have no offsets: decompress them first." if ".tar." in source else ""
    picture = " `ntf predict` scores single pictures." if _suffix(source) in PICTURE_SUFFIXES else ""
    raise UsageError(source, got=got, wanted=_WANTED, remedy=f"check the path.{compressed}{picture}")
