"""Labelled picture collections: what lies in a folder, in tar shards or in a list, read strictly.

Folders: at any depth, the label is the folder called `0_real` | `1_fake`, `real` | `fake` or `nature` | `ai`.
A split folder (`train`, `val`, `test`) may stand first, second or right above the label; the generator is the first
other folder above the label. So these are read as they are distributed:

    <split>/<generator>/{0_real,1_fake}/                      also without the split, or with class folders between
    <generator>/{real,fake}/
    <generator>/{train,val}/{ai,nature}/                      GenImage
    <generator>/imagenet_ai_<...>/{train,val}/{ai,nature}/    GenImage as its archives unpack

Shards: a folder of uncompressed tar files, `000001.jpg` beside `000001.json` or `000001.cls` (see `train.shards`).
CSV files: columns `path,label` and optionally `generator`, `family`, `original_id`, `split`.
JSON files: a list of objects with the same keys; `label` is the number 0 or 1.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runtime.decode import PICTURE_SUFFIXES
from train.data_csv import (
    LABEL_WORDS,
    SPLIT_WORDS,
    PictureRow,
    SourceRow,
    read_picture_rows,
    read_source_rows,
    summary,
)
from train.data_json import read_picture_entries
from train.data_shards import SHARD_SUFFIX, is_shard_folder, read_shards
from train.errors import DataError
from train.pictures import PictureRecord, PictureSet, relative_path

__all__ = ["PictureRecord", "PictureSet", "load_split", "scan_pictures"]

LAYOUTS = {
    "0_real | 1_fake": ("0_real", "1_fake"),
    "real | fake": ("real", "fake"),
    "nature | ai": ("nature", "ai"),
}
LAYOUT_HELP = (
    "pictures in folders "
    + ", or ".join(LAYOUTS)
    + " at any depth, tar shards, a CSV file path,label[,generator,split] or a JSON list of such objects"
)
LISTS = {".csv": ("CSV", read_picture_rows), ".json": ("JSON", read_picture_entries)}
SOURCES_FILE = "sources.csv"


def scan_pictures(source: Path | str, *, require_both: bool = True) -> PictureSet:
    """All labelled pictures below a folder, in shards or in a list.

    Args:
        source: folder of pictures or shards, or a `.csv`, `.json` or `.tar` file.
        require_both: refuse a collection that has only real or only fake pictures.

    Raises:
        DataError: nothing there, no or unlabelled pictures, one class only, rows that cannot be used, or one
            file under two labels, in two splits, or twice in one generator.
    """
    source = Path(source)
    place = Path(os.path.abspath(source))
    if is_shard_folder(place) or (place.suffix.lower() == SHARD_SUFFIX and place.is_file()):
        found = read_shards(place)
    elif source.is_dir():
        found = _scan_folder(place)
    elif source.suffix.lower() in LISTS and source.is_file():
        found = _scan_list(place)
    else:
        raise DataError(
            f"picture collection {source}",
            got="a file that is no CSV, JSON or tar" if source.exists() else "nothing at that path",
            wanted=LAYOUT_HELP,
            remedy="check the path",
        )
    _refuse_contradictions(found)
    if require_both:
        require_both_classes(found, str(source))
    return found


def load_split(source: Path | str, split: str, *, require_both: bool = True) -> PictureSet:
    """The pictures of one split of a collection.

    Raises:
        DataError: as `scan_pictures`; or the split is absent, or has one class only while both are required.
    """
    chosen = scan_pictures(source, require_both=require_both).split(split)
    if require_both:
        require_both_classes(chosen, f"split {split!r} of {source}")
    return chosen


def _scan_folder(root: Path) -> PictureSet:
    records: list[PictureRecord] = []
    unlabelled: list[str] = []
    styles: set[str] = set()
    skipped = 0
    for path in sorted(_files_below(root, (os.path.realpath(root),)), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            skipped += len(parts) > 1
            continue
        labels = [part.lower() for part in parts[:-1] if part.lower() in LABEL_WORDS]
        if not labels:
            unlabelled.append(path.relative_to(root).as_posix())
            continue
        styles.update(name for name, words in LAYOUTS.items() if set(words) & set(labels))
        records.append(_record_from_folders(path, root, labels))
    _refuse_unlabelled(root, unlabelled, len(records))
    enriched = _with_sources(root, records)
    return PictureSet(root, ", ".join(sorted(styles)), tuple(enriched), skipped)


def _files_below(folder: Path, ancestors: tuple[str, ...]) -> Iterator[Path]:
    """Files at any depth; links are followed, hidden names left out."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                # A link to a folder above adds no picture and would never end.
                if real not in ancestors:
                    yield from _files_below(folder / entry.name, (*ancestors, real))
            elif entry.is_file():
                yield folder / entry.name
            elif Path(entry.name).suffix.lower() in PICTURE_SUFFIXES:
                raise DataError(
                    entry.path,
                    got="a link whose target is not there" if entry.is_symlink() else "no regular file",
                    wanted="a picture file",
                    remedy="restore the target or remove the entry",
                )


def _record_from_folders(path: Path, root: Path, labels: list[str]) -> PictureRecord:
    relative = path.relative_to(root)
    values = {LABEL_WORDS[word] for word in labels}
    if len(values) > 1:
        raise DataError(
            str(path),
            got=f"folders for both classes in one path ({', '.join(labels)})",
            wanted="one label folder above each picture",
            remedy="rename one of the two folders, or list the pictures in a CSV file",
        )
    above = list(relative.parts[: [p.lower() for p in relative.parts].index(labels[0])])
    split = None
    named = next((part for part in (*above[:2], *above[-1:]) if part.lower() in SPLIT_WORDS), None)
    if named is not None:
        split = SPLIT_WORDS[named.lower()]
        above.remove(named)
    generator = above[0] if above else root.name
    return PictureRecord(path, values.pop(), generator, generator, relative.as_posix(), split)


def _with_sources(root: Path, records: list[PictureRecord]) -> list[PictureRecord]:
    """Records with family and original from `sources.csv`, where the root has one.

    The folder decides which set a picture is evaluated with; the file's generator counts only where no folder
    names one, since such files often give real pictures a source of their own there.
    """
    table = root / SOURCES_FILE
    if not table.is_file():
        return records
    rows = read_source_rows(table)
    known = {relative_path(r.path, root) for r in records}
    problems = [f"line {row.line}: {path} is not there" for path, row in rows.items() if path not in known]
    enriched = []
    for record in records:
        row = rows.get(relative_path(record.path, root))
        if row is not None and row.label is not None and row.label != record.label:
            problems.append(f"line {row.line}: label {row.label}, but its folder says {record.label}")
        enriched.append(_enriched(record, row, root.name))
    if problems:
        raise DataError(
            str(table),
            got=summary(problems),
            wanted="rows that agree with the pictures beside it",
            remedy="correct or remove those rows, or restore the pictures",
        )
    return _with_families_of_fakes(enriched)


def _enriched(record: PictureRecord, row: SourceRow | None, unnamed: str) -> PictureRecord:
    if row is None:
        return record
    generator = (row.generator or unnamed) if record.generator == unnamed else record.generator
    return replace(
        record,
        generator=generator,
        family=row.family or generator,
        original_id=row.original_id or record.original_id,
    )


def _with_families_of_fakes(records: list[PictureRecord]) -> list[PictureRecord]:
    """Real pictures get the commonest family of the fakes they are set against."""
    families: dict[str, Counter[str]] = {}
    for record in records:
        if record.label == 1:
            families.setdefault(record.generator, Counter())[record.family] += 1
    common = {generator: max(sorted(c), key=c.__getitem__) for generator, c in families.items()}
    return [r if r.label else replace(r, family=common.get(r.generator, r.generator)) for r in records]


def _scan_list(table: Path) -> PictureSet:
    kind, read = LISTS[table.suffix.lower()]
    return PictureSet(table.parent, f"{kind} {table.name}", _records_of_rows(read(table), table.parent))


def _records_of_rows(rows: list[PictureRow], root: Path) -> tuple[PictureRecord, ...]:
    records = [
        PictureRecord(
            path=row.path,
            label=row.label,
            generator=row.generator or root.name,
            family=row.family or row.generator or root.name,
            original_id=row.original_id or relative_path(row.path, root),
            split=row.split,
        )
        for row in rows
    ]
    return tuple(_with_families_of_fakes(records))


def _refuse_unlabelled(root: Path, unlabelled: list[str], labelled: int) -> None:
    if labelled and not unlabelled:
        return
    if unlabelled:
        got = f"{len(unlabelled):,} pictures in no label folder ({summary(unlabelled)})"
        remedy = "move them into label folders, take them out of the folder, or list the pictures in a CSV or JSON file"
    else:
        got = "no picture at all"
        remedy = "check the path; suffixes looked for: " + " ".join(sorted(PICTURE_SUFFIXES))
    raise DataError(f"folder {root}", got=got, wanted=LAYOUT_HELP, remedy=remedy)


def _refuse_contradictions(found: PictureSet) -> None:
    """Refuses one file under two labels or splits (a leak), or twice in one generator (counted double)."""
    first: dict[str, PictureRecord] = {}
    members: set[tuple[str, str]] = set()
    problems = []
    for record in found.records:
        real = os.path.realpath(record.path)
        known = first.setdefault(real, record)
        if known.label != record.label:
            problems.append(f"{record.path} is both real and fake")
        elif known.split != record.split:
            problems.append(f"{record.path} is in the splits {known.split} and {record.split}")
        elif (real, record.generator) in members:
            problems.append(f"{record.path} is listed twice for {record.generator}")
        members.add((real, record.generator))
    if problems:
        raise DataError(
            f"pictures of {found.root}",
            got=summary(problems),
            wanted="each file once per generator, with one label and in one split",
            remedy="remove the duplicates",
        )


def require_both_classes(found: PictureSet, subject: str) -> None:
    counts = Counter(r.label for r in found.records)
    if len(counts) < 2:
        only, missing = ("real", "fake") if 0 in counts else ("fake", "real")
        raise DataError(
            subject,
            got=f"{len(found):,} pictures, all of them {only} ({found.layout})",
            wanted=f"pictures of both classes; looked for {missing} ones as {LAYOUT_HELP}",
            remedy=f"add the {missing} pictures or check the folder names",
        )
