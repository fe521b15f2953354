"""JSON lists of pictures, `[{"path": ..., "label": 0 or 1}, ...]`; every entry that cannot be used is named.

Optional keys are `generator`, `family`, `original_id` and `split`; others are left alone, since such lists often
carry prompts and the like. Paths count from the list's folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from train.data_csv import PictureRow, picture_row, row_complaint, summary
from train.errors import DataError

TEXT_KEYS = ("path", "generator", "family", "original_id", "split")
FORM = '[{"path": "a.png", "label": 0}, ...], label 0 real or 1 fake, optionally with generator and split'


def read_picture_entries(path: Path) -> list[PictureRow]:
    """Entries of a JSON list, in file order.

    Raises:
        DataError: the file is no JSON list, is empty, or has entries that cannot be used (named by number from 1).
    """
    entries = _list_in(path)
    rows: list[PictureRow] = []
    problems: list[str] = []
    numbers: dict[tuple[Path, str], int] = {}
    for number, entry in enumerate(entries, start=1):
        complaint = _complaint(entry)
        cells = {} if complaint else _cells(entry)
        complaint = complaint or row_complaint(cells, path.parent)
        if complaint:
            problems.append(f"entry {number}: {complaint}")
            continue
        row = picture_row(cells, path.parent)
        key = (row.path, row.generator)
        if key in numbers:
            problems.append(f"entry {number}: {cells['path']} is already entry {numbers[key]}")
        numbers.setdefault(key, number)
        rows.append(row)
    if not entries:
        problems.append("an empty list, no pictures")
    if problems:
        raise DataError(
            str(path), got=summary(problems), wanted=FORM, remedy="correct those entries; paths count from the list"
        )
    return rows


def _list_in(path: Path) -> list[object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            str(path), got=f"a list that cannot be read ({error})", wanted=FORM, remedy="save it again as UTF-8 JSON"
        ) from error
    if not isinstance(value, list):
        raise DataError(
            str(path), got=f"{_kind(value)} at the top", wanted=FORM, remedy="put the entries into one list"
        )
    return value


def _complaint(entry: object) -> str | None:
    """Why an entry has the wrong form, or None."""
    if not isinstance(entry, dict):
        return f"{_kind(entry)}, wanted an object"
    missing = [key for key in ("path", "label") if key not in entry]
    if missing:
        return f"no {' and no '.join(missing)}"
    wrong = [key for key in TEXT_KEYS if entry.get(key) is not None and not isinstance(entry[key], str)]
    if entry["path"] is None or wrong:
        key = wrong[0] if wrong else "path"
        return f"{key} is {_kind(entry[key])}, wanted text"
    label = entry["label"]
    if isinstance(label, bool) or not isinstance(label, int):
        return f"label is {_kind(label)}, wanted the number 0 or 1"
    return None if label in (0, 1) else f"label {label} is neither 0 (real) nor 1 (fake)"


def _cells(entry: object) -> dict[str, str]:
    assert isinstance(entry, dict)
    texts = {key: str(entry[key]).strip() for key in TEXT_KEYS if entry.get(key) is not None}
    return texts | {"label": str(entry["label"])}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "a boolean"), (str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))
    shown = next((name for kind, name in kinds if isinstance(value, kind)), "an object")
    return f"{shown} {value!r}"[:60] if isinstance(value, (bool, str, int, float)) else shown
