"""Rows to one file: CSV, JSON lines or Parquet, by the ending of its name."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from runtime.errors import UsageError
from runtime.scoring.parquet import import_parquet
from runtime.scoring.rows import COLUMNS, Row, row_to_line

# Rows of one row group in Parquet; some megabytes of names.
_GROUP_ROWS = 1 << 16


def require_results_path(out: Path, *, overwrite: bool) -> None:
    """Nothing for a path that `write_results` can serve, found out before anything is scored.

    Args:
        out: of the results file.
        overwrite: a file that is there may be replaced.

    Raises:
        UsageError: another ending, a missing package, no such folder, or a file that may not be replaced.
    """
    if out.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"--out {out}",
            got=f"a name that ends in {out.suffix!r}",
            wanted=f"one that ends in {', '.join(_WRITERS)}",
            remedy="choose such a name",
        )
    if out.suffix.lower() == ".parquet":
        import_parquet(f"--out {out}")
    if not out.parent.is_dir():
        raise UsageError(
            f"--out {out}", got="a folder that is not there", wanted="an existing folder", remedy="make the folder"
        )
    if out.is_dir() or (out.exists() and not overwrite):
        raise UsageError(
            f"--out {out}",
            got="a folder" if out.is_dir() else "a file that is already there",
            wanted="a new file",
            remedy="choose another name, or replace the file with --overwrite",
        )


def write_results(path: Path, rows: Iterable[Row], *, suffix: str) -> None:
    """Writes rows as they come; the file is on the disk when this returns.

    Args:
        path: file to write, whatever its own name.
        rows: all of them, in order; some thousands at most are held in memory.
        suffix: ".csv", ".jsonl" or ".parquet".
    """
    _WRITERS[suffix](path, rows)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # Quoted all: else a bare carriage return in a name, which is allowed there, would end a row.
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def _write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="ascii") as file:
        file.writelines(f"{row_to_line(row)}\n" for row in rows)


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    import pyarrow

    parquet = import_parquet(str(path))
    kinds = [pyarrow.string(), pyarrow.string(), pyarrow.float64(), pyarrow.float64(), pyarrow.string()]
    schema = pyarrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    pending = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(pending, _GROUP_ROWS)):
            columns = map(list, zip(*group, strict=True))
            writer.write_table(pyarrow.table(dict(zip(COLUMNS, columns, strict=True)), schema=schema))


_WRITERS: dict[str, Callable[[Path, Iterable[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
