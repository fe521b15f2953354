"""Labelled picture collections: what lies in a folder or a CSV file, read strictly.

Folders: at any depth, the label is the folder called `0_real` | `1_fake`, `real` | `fake` or `nature` | `ai`.
A split folder (`train`, `val`, `test`) may stand first or second; the generator is the first other folder
above the label.
CSV files: columns `path,label` and optionally `generator`, `family`, `original_id`, `split`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.decode import PICTURE_SUFFIXES
from train.data_csv import (
    LABEL_WORDS,
    SPLIT_WORDS,
    SourceRow,
    read_picture_rows,
    read_source_rows,
    summary,
)
from train.errors import DataError

LAYOUTS = {
    "0_real | 1_fake": ("0_real", "1_fake"),
    "real | fake": ("real", "fake"),
    "nature | ai": ("nature", "ai"),
}
LAYOUT_HELP = (
    "pictures in folders " + ", or ".join(LAYOUTS) + " at any depth, or a CSV file path,label[,generator,split]"
)
SOURCES_FILE = "sources.csv"


@dataclass(frozen=True)
class PictureRecord:
    """One labelled picture.

    Attributes:
        path: absolute path of the file.
        label: 0 real, 1 fake.
        generator: the set it is evaluated with.
        family: family of the generator; the generator's name where it is not known.
        original_id: picture it was cropped or made from; pictures that share it are resampled together.
        split: `train`, `val`, `test`, or None where the collection has no splits.
    """

    path: Path
    label: int
    generator: str
    family: str
    original_id: str
    split: str | None


@dataclass(frozen=True)
class PictureSet:
    """Records in the order of their relative paths (folders) or of their rows (CSV).

    Attributes:
        root: folder that relative paths count from.
        layout: how the labels were found, for the reader.
        records: the pictures.
        skipped: files that stand among the pictures and have no picture suffix.
    """

    root: Path
    layout: str
    records: tuple[PictureRecord, ...]
    skipped: int = 0

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
        return replace(self, records=records)

    def describe(self) -> str:
        """A table of what was found, one row per split and generator."""
        reals = sum(r.label == 0 for r in self.records)
        head = f"{self.root} ({self.layout}): {len(self):,} pictures, {reals:,} real, {len(self) - reals:,} fake"
        if self.skipped:
            head += f"; {self.skipped:,} other files left out"
        return "\n".join([head, *_table(self.records)])

    def content_sha256(self) -> str:
        """Hex digest over relative paths, labels and file bytes, independent of the records' order."""
        lines = sorted(f"{_relative(r.path, self.root)}\0{r.label}\0{_file_sha256(r.path)}" for r in self.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def scan_pictures(source: Path | str, *, require_both: bool = True) -> PictureSet:
    """All labelled pictures below a folder or in a CSV file.

    Args:
        source: folder or `.csv` file.
        require_both: refuse a collection that has only real or only fake pictures.

    Raises:
        DataError: nothing there, no or unlabelled pictures, one class only, rows that cannot be used, or one
            file under two labels, in two splits, or twice in one generator.
    """
    source = Path(source)
    if source.is_dir():
        found = _scan_folder(Path(os.path.abspath(source)))
    elif source.suffix.lower() == ".csv" and source.is_file():
        found = _scan_csv(Path(os.path.abspath(source)))
    else:
        raise DataError(
            f"picture collection {source}",
            got="a file that is not CSV" if source.exists() else "nothing at that path",
            wanted=LAYOUT_HELP,
            remedy="check the path",
        )
    _refuse_contradictions(found)
    if require_both:
        _require_both_classes(found, str(source))
    return found


def load_split(source: Path | str, split: str, *, require_both: bool = True) -> PictureSet:
    """The pictures of one split of a folder or CSV file.

    Raises:
        DataError: as `scan_pictures`; or the split is absent, or has one class only while both are required.
    """
    chosen = scan_pictures(source, require_both=require_both).split(split)
    if require_both:
        _require_both_classes(chosen, f"split {split!r} of {source}")
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
    split = next((SPLIT_WORDS[part.lower()] for part in above[:2] if part.lower() in SPLIT_WORDS), None)
    if split is not None:
        above.remove(next(part for part in above[:2] if part.lower() in SPLIT_WORDS))
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
    known = {_relative(r.path, root) for r in records}
    problems = [f"line {row.line}: {path} is not there" for path, row in rows.items() if path not in known]
    enriched = []
    for record in records:
        row = rows.get(_relative(record.path, root))
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


def _scan_csv(table: Path) -> PictureSet:
    root = table.parent
    records = [
        PictureRecord(
            path=row.path,
            label=row.label,
            generator=row.generator or root.name,
            family=row.family or row.generator or root.name,
            original_id=row.original_id or _relative(row.path, root),
            split=row.split,
        )
        for row in read_picture_rows(table)
    ]
    return PictureSet(root, f"CSV {table.name}", tuple(_with_families_of_fakes(records)))


def _refuse_unlabelled(root: Path, unlabelled: list[str], labelled: int) -> None:
    if labelled and not unlabelled:
        return
    if unlabelled:
        got = f"{len(unlabelled):,} pictures in no label folder ({summary(unlabelled)})"
        remedy = "move them into label folders, take them out of the folder, or list the pictures in a CSV file"
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


def _require_both_classes(found: PictureSet, subject: str) -> None:
    counts = Counter(r.label for r in found.records)
    if len(counts) < 2:
        only, missing = ("real", "fake") if 0 in counts else ("fake", "real")
        raise DataError(
            subject,
            got=f"{len(found):,} pictures, all of them {only} ({found.layout})",
            wanted=f"pictures of both classes; looked for {missing} ones as {LAYOUT_HELP}",
            remedy=f"add the {missing} pictures or check the folder names",
        )


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


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
