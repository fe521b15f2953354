"""The two CSV forms of a picture collection; every row that cannot be used is named by its line number.

`row_complaint` and `picture_row` serve every list of pictures, whatever its format.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.decode import PICTURE_SUFFIXES
from train.errors import DataError

LABEL_WORDS = {"0_real": 0, "1_fake": 1, "real": 0, "fake": 1, "nature": 0, "ai": 1}
CSV_LABELS = {"0": 0, "1": 1, **LABEL_WORDS}
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class PictureRow:
    """One row of a list of pictures; empty strings where a column is absent."""

    path: Path
    label: int
    generator: str
    family: str
    original_id: str
    split: str | None


@dataclass(frozen=True)
class SourceRow:
    """One row of `sources.csv`; empty strings where a column is absent."""

    line: int
    label: int | None
    generator: str
    family: str
    original_id: str


def summary(items: Sequence[str], shown: int = 4) -> str:
    """The first few items and how many more there are."""
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + more


def read_picture_rows(table: Path) -> list[PictureRow]:
    """Rows of a CSV collection, in file order.

    Raises:
        DataError: no row, missing columns, or rows that cannot be used (named by line number).
    """
    rows: list[PictureRow] = []
    problems: list[str] = []
    lines: dict[tuple[Path, str], int] = {}
    for line, cells in _cells(table, needed=("path", "label")):
        complaint = row_complaint(cells, table.parent)
        if complaint:
            problems.append(f"line {line}: {complaint}")
            continue
        row = picture_row(cells, table.parent)
        key = (row.path, row.generator)
        if key in lines:
            problems.append(f"line {line}: {cells['path']} is already on line {lines[key]}")
        lines.setdefault(key, line)
        rows.append(row)
    if not rows and not problems:
        problems.append("no row below the header")
    _raise_for(table, problems, "rows path,label[,generator,family,original_id,split] of existing pictures")
    return rows


def read_source_rows(table: Path) -> dict[str, SourceRow]:
    """Rows of `sources.csv` by relative POSIX path.

    Raises:
        DataError: no `path` column, or rows that cannot be used (named by line number).
    """
    rows: dict[str, SourceRow] = {}
    problems = []
    for line, cells in _cells(table, needed=("path",)):
        path = PurePosixPath(cells["path"].replace("\\", "/")).as_posix()
        label = cells.get("label", "").lower()
        if path in rows:
            problems.append(f"line {line}: {path} is already on line {rows[path].line}")
        elif label and label not in CSV_LABELS:
            problems.append(f"line {line}: label {label!r} is none of {', '.join(CSV_LABELS)}")
        else:
            rows[path] = SourceRow(line, CSV_LABELS.get(label), *_names(cells))
    _raise_for(table, problems, "one usable row per picture")
    return rows


def _cells(table: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by lower-case column name; blank lines are left out."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if not set(needed) <= set(header) or len(set(header)) < len(header):
                problem = f"line 1: columns {', '.join(header) or 'none'}"
                _raise_for(table, [problem], f"a header with each column once, {' and '.join(needed)} among them")
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(header):
                    problem = f"line {reader.line_num}: {len(row)} fields under {len(header)} columns"
                    _raise_for(table, [problem], "as many fields as columns")
                yield reader.line_num, {n: c.strip() for n, c in zip(header, row, strict=True)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            str(table),
            got=f"a list that cannot be read ({error})",
            wanted="UTF-8 CSV",
            remedy="save it again as UTF-8 CSV, where this user may read it",
        ) from error


def row_complaint(cells: dict[str, str], root: Path) -> str | None:
    """Why a row, as text by column, cannot be used, or None."""
    path = root / cells["path"]
    if not cells["path"]:
        return "empty path"
    if cells["label"].lower() not in CSV_LABELS:
        return f"label {cells['label']!r} is none of {', '.join(CSV_LABELS)}"
    if cells.get("split", "") and cells["split"].lower() not in SPLIT_WORDS:
        return f"split {cells['split']!r} is none of {', '.join(SPLIT_WORDS)}"
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return f"{cells['path']} has no picture suffix ({' '.join(sorted(PICTURE_SUFFIXES))})"
    if not path.is_file():
        return f"{cells['path']} is not there"
    return None


def picture_row(cells: dict[str, str], root: Path) -> PictureRow:
    """The row, as text by column, that `row_complaint` found nothing wrong with."""
    return PictureRow(
        Path(os.path.abspath(root / cells["path"])),
        CSV_LABELS[cells["label"].lower()],
        *_names(cells),
        SPLIT_WORDS.get(cells.get("split", "").lower()),
    )


def _names(cells: dict[str, str]) -> tuple[str, str, str]:
    return cells.get("generator", ""), cells.get("family", ""), cells.get("original_id", "")


def _raise_for(table: Path, problems: list[str], wanted: str) -> None:
    if problems:
        raise DataError(
            str(table),
            got=summary(problems),
            wanted=wanted,
            remedy="correct those lines; paths count from the CSV's folder",
        )
