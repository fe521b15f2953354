"""What an audit holds, and its Markdown and its tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from train.pictures import CorruptPicture
from train.report_tables import markdown_table

SHOWN = 20
CLASS_HEAD = (
    "split",
    "generator",
    "class",
    "pictures",
    "formats",
    "size",
    "JPEG quality",
    "tables",
    "EXIF",
    "KB",
    "copies",
)
SHORTCUT_HEAD = ("split", "generator", "real", "fake", "trivial AUC", "learnt on train", "verdict")
NOTE = (
    "Trivial AUC: what a classifier reaches that sees file format, picture size, JPEG tables, metadata and file length "
    "alone, cross-validated within the set by original; 0.5 is chance. The file length also depends on what a picture "
    "shows. `learnt on train`: the same classifier, fitted on the whole train split."
)


@dataclass(frozen=True)
class Spread:
    """Of a number over pictures."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class ClassStats:
    """The files of one class of one generator in one split.

    Attributes:
        split: its name, or None.
        generator: the set.
        label: 0 real, 1 fake.
        pictures: that could be decoded.
        formats: pictures by format.
        modes: pictures by colour mode.
        sizes: pictures by width x height, the ten commonest.
        different_sizes: how many there are in all.
        width_px: columns.
        height_px: rows.
        file_bytes: lengths.
        jpeg_quality: estimated from the luminance tables; None without JPEG files.
        jpeg_tables: JPEG files by hash of their quantisation tables, the ten commonest.
        different_jpeg_tables: how many there are in all.
        jpeg_subsampling: JPEG files by Pillow's number (0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0, -1 others).
        progressive_share: progressive JPEG files, of all pictures.
        exif_share: pictures with EXIF data.
        icc_profile_share: pictures with a colour profile.
        exact_copies: pictures whose bytes an earlier picture of the same class has.
    """

    split: str | None
    generator: str
    label: int
    pictures: int
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: dict[str, int]
    different_sizes: int
    width_px: Spread
    height_px: Spread
    file_bytes: Spread
    jpeg_quality: Spread | None
    jpeg_tables: dict[str, int]
    different_jpeg_tables: int
    jpeg_subsampling: dict[str, int]
    progressive_share: float
    exif_share: float
    icc_profile_share: float
    exact_copies: int


@dataclass(frozen=True)
class ShortcutResult:
    """How far trivial features give the label away.

    Attributes:
        split: its name, or None.
        generator: the set.
        real: real pictures.
        fake: fakes.
        auc: cross-validated; None for too few pictures.
        low: lower end of its 95 % interval.
        by_group: AUC of each group of features alone.
        readable_groups: the groups that suffice alone.
        auc_learnt_on_train: AUC of what was learnt on the train split; None for the train split itself.
        verdict: in words.
        finding: whether it is one.
    """

    split: str | None
    generator: str
    real: int
    fake: int
    auc: float | None
    low: float | None
    by_group: dict[str, float]
    readable_groups: tuple[str, ...]
    auc_learnt_on_train: float | None
    verdict: str
    finding: bool


@dataclass(frozen=True)
class DuplicatePair:
    """Two pictures with the same content; `distance` of 256 bits for near duplicates, 0 for the same bytes."""

    first: str
    second: str
    distance: int


@dataclass(frozen=True)
class AuditReport:
    """Everything an audit found.

    Attributes:
        data: the collection.
        layout: how its labels were found.
        treatment: what was done to both classes before files were looked at, in words.
        pictures: how many there are, corrupt ones included.
        classes: figures by split, generator and class.
        shortcuts: by split and generator.
        corrupt: pictures that cannot be decoded.
        duplicates_across_splits: the same bytes in two splits.
        duplicates_with_both_labels: the same bytes as real and as fake.
        near_duplicates_across_splits: pictures that look the same.
        findings: what a person has to know, in sentences; none for a clean set.
        environment: tool, machine and versions.
    """

    data: str
    layout: str
    treatment: str
    pictures: int
    classes: tuple[ClassStats, ...]
    shortcuts: tuple[ShortcutResult, ...]
    corrupt: tuple[CorruptPicture, ...]
    duplicates_across_splits: tuple[DuplicatePair, ...]
    duplicates_with_both_labels: tuple[DuplicatePair, ...]
    near_duplicates_across_splits: tuple[DuplicatePair, ...]
    findings: tuple[str, ...]
    environment: dict[str, Any]


def audit_markdown(report: AuditReport) -> str:
    """The audit for reading."""
    sections = [
        f"# Audit of {report.data}",
        f"{report.pictures:,} pictures ({report.layout}), {report.treatment}.",
        "## Findings\n\n" + ("\n".join(f"- {line}" for line in report.findings) or "None."),
        f"## What gives the label away\n\n{markdown_table(SHORTCUT_HEAD, _shortcut_rows(report))}\n\n{NOTE}",
        f"## Files\n\n{markdown_table(CLASS_HEAD, _class_rows(report))}",
    ]
    for title, lines in _lists(report):
        sections.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(sections) + "\n"


def print_audit(report: AuditReport, console: Console) -> None:
    """The audit for a terminal."""
    console.print(f"{report.data} ({report.layout}): {report.pictures:,} pictures, {report.treatment}")
    console.print(_table("Files", CLASS_HEAD, _class_rows(report)))
    console.print(_table("What gives the label away", SHORTCUT_HEAD, _shortcut_rows(report)))
    for title, lines in _lists(report):
        console.print(f"{title}:")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)
    for line in report.findings:
        console.print(f"finding: {line}", style="bold red", soft_wrap=True)
    if not report.findings:
        console.print("clean: no finding", style="bold green")


def _lists(report: AuditReport) -> list[tuple[str, list[str]]]:
    """Titles and lines of what is listed picture by picture, empty lists left out; the JSON has them whole."""
    pairs = (
        ("The same bytes in two splits", report.duplicates_across_splits),
        ("The same bytes with both labels", report.duplicates_with_both_labels),
        ("Near duplicates across splits", report.near_duplicates_across_splits),
    )
    lists = [("Corrupt pictures", [f"{p.path}: {p.reason}" for p in report.corrupt])]
    lists += [(title, [_pair(p) for p in found]) for title, found in pairs]
    return [(f"{title} ({len(lines):,})", _first(lines)) for title, lines in lists if lines]


def _pair(pair: DuplicatePair) -> str:
    names = f"{pair.first} = {pair.second}"
    return f"{names}, {pair.distance} of 256 bits differ" if pair.distance else names


def _first(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _class_rows(report: AuditReport) -> list[tuple[str, ...]]:
    return [
        (
            c.split or "-",
            c.generator,
            "fake" if c.label else "real",
            f"{c.pictures:,}",
            ", ".join(f"{name} {100 * n / c.pictures:.0f} %" for name, n in c.formats.items()),
            _size(c),
            "-" if c.jpeg_quality is None else _range(c.jpeg_quality, 1),
            _tables(c),
            f"{100 * c.exif_share:.0f} %",
            _range(c.file_bytes, 1000),
            f"{c.exact_copies:,}",
        )
        for c in report.classes
    ]


def _size(c: ClassStats) -> str:
    if c.different_sizes == 1:
        return next(iter(c.sizes))
    return f"{_range(c.width_px, 1)} x {_range(c.height_px, 1)}, {c.different_sizes:,} sizes"


def _tables(c: ClassStats) -> str:
    if not c.jpeg_tables:
        return "-"
    name, count = next(iter(c.jpeg_tables.items()))
    return name if c.different_jpeg_tables == 1 else f"{c.different_jpeg_tables:,}, {name} {count:,} times"


def _range(spread: Spread, unit: int) -> str:
    """Median and, where they differ, the ends."""
    middle = f"{spread.median / unit:.0f}"
    if spread.smallest == spread.largest:
        return middle
    return f"{middle} ({spread.smallest / unit:.0f}-{spread.largest / unit:.0f})"


def _shortcut_rows(report: AuditReport) -> list[tuple[str, ...]]:
    def shown(auc: float | None) -> str:
        return "-" if auc is None else f"{auc:.2f}"

    return [
        (
            s.split or "-",
            s.generator,
            f"{s.real:,}",
            f"{s.fake:,}",
            shown(s.auc),
            shown(s.auc_learnt_on_train),
            s.verdict,
        )
        for s in report.shortcuts
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in head:
        table.add_column(name, overflow="fold", no_wrap=name in ("split", "generator", "class"))
    for row in rows:
        table.add_row(*row)
    return table
