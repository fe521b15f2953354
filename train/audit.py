"""What a data set gives away before its pixels are looked at: `python -m train.audit --data DIR [--json FILE]`.

For each split, generator and class: formats, sizes, JPEG tables, metadata. For each split and generator: the AUC that
such features alone reach. Then duplicates, near duplicates across splits, and files that cannot be decoded.
The exit status is 0 for a clean data set, 1 where there is a finding, 2 where the command could not be carried out.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from runtime.errors import NTFError, PictureError
from train.audit_report import (
    AuditReport,
    ClassStats,
    DuplicatePair,
    ShortcutResult,
    Spread,
    audit_markdown,
    print_audit,
)
from train.checkpoint import make_folder, write_atomically
from train.data import scan_pictures
from train.equalize import EqualizeConfig, check_equalize
from train.integrity import PORTION, Check, require_size
from train.near_duplicates import near_pairs, thumbnail_of
from train.pictures import (
    CorruptPicture,
    PictureRecord,
    PictureSet,
    equalized_bytes,
    pixels_of,
    relative_path,
)
from train.provenance import environment
from train.trivial_features import Traits, set_auc, traits_of, transfer_aucs

# An AUC of which 95 % of the interval lies above this is a finding: chance differs by less on sets that are worth
# evaluating.
FINDING_AUC = 0.6
# From here on the verdict says that the label can be read, below that it can be read in part.
READABLE_AUC = 0.9
# Columns of the tables where the output is no terminal, which would have a width of its own.
PLAIN_WIDTH = 160


@dataclass(frozen=True)
class Options:
    """Formats, sizes, JPEG tables, metadata, duplicates, and how far they give the label away."""

    data: Path
    """Folder, tar shards, CSV file or JSON list with labelled pictures."""
    json: Path | None = None
    """File to write the whole audit to."""
    markdown: Path | None = None
    """File to write the audit to, for reading."""
    equalize: Annotated[EqualizeConfig, tyro.conf.arg(name="")] = field(default_factory=EqualizeConfig)
    workers: int = 0
    """Threads that decode; 0 and 1 are one."""
    progress: bool = True
    """Show progress bars."""


class _Seen(NamedTuple):
    """One picture, looked at once."""

    record: PictureRecord
    check: Check
    traits: Traits | None
    thumbnail: NDArray[np.uint8] | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m train.audit", args=arguments)
    try:
        check_equalize(options.equalize)
        for option, path in (("--json", options.json), ("--markdown", options.markdown)):
            if path is not None:
                make_folder(path.parent, option=option)
        pictures = scan_pictures(options.data, require_both=False)
        report = audit_pictures(pictures, equalize=options.equalize, workers=options.workers, progress=options.progress)
        as_json = json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n"
        for path, text in ((options.json, as_json), (options.markdown, audit_markdown(report))):
            if path is not None:
                write_atomically(path, text.encode())
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}: correct it and start again", file=sys.stderr)
        return 2
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    print_audit(report, console)
    return 1 if report.findings else 0


def audit_pictures(
    pictures: PictureSet, *, equalize: EqualizeConfig | None = None, workers: int = 0, progress: bool = False
) -> AuditReport:
    """Everything the audit says; each picture is read and decoded once.

    Args:
        pictures: a collection, with as many splits as it has.
        equalize: look at the pictures as they are after this treatment.
        workers: threads that decode.
        progress: show a progress bar.

    Raises:
        DataError: a shard is damaged, or a picture is smaller than the equalised crop.
    """
    treatment = equalize if equalize is not None and equalize.enabled else None
    seen = _look_at_all(pictures.records, treatment, workers, progress)
    if treatment is not None:
        require_size(pictures.root, [(s.record, s.check) for s in seen], treatment)
    usable = [s for s in seen if s.traits is not None]
    corrupt = tuple(_corrupt(s, pictures.root) for s in seen if s.check.reason)
    shortcuts = _shortcuts(usable)
    across, contradictions, near = _duplicates(usable, pictures.root)
    return AuditReport(
        data=str(pictures.root),
        layout=pictures.layout,
        treatment=(treatment or EqualizeConfig()).describe(),
        pictures=len(pictures),
        classes=_class_stats(usable),
        shortcuts=shortcuts,
        corrupt=corrupt,
        duplicates_across_splits=across,
        duplicates_with_both_labels=contradictions,
        near_duplicates_across_splits=near,
        findings=_findings(shortcuts, corrupt, across, contradictions, near),
        environment=environment(),
    )


def _look_at_all(
    records: Sequence[PictureRecord], treatment: EqualizeConfig | None, workers: int, progress: bool
) -> list[_Seen]:
    seen: list[_Seen] = []
    starts = range(0, len(records), PORTION)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in track(starts, "looking at pictures", disable=not progress or len(records) <= PORTION):
            seen += pool.map(partial(_look_at, treatment=treatment), records[start : start + PORTION])
    return seen


def _look_at(record: PictureRecord, treatment: EqualizeConfig | None) -> _Seen:
    try:
        data = record.read_bytes()
    except PictureError as error:
        return _Seen(record, Check("", error.got), None, None)
    digest = record.digest(data)
    try:
        rgb = pixels_of(record, data)
    except PictureError as error:
        return _Seen(record, Check(digest, error.got), None, None)
    check = Check(digest, "", rgb.shape[0], rgb.shape[1])
    record = replace(record, sha256=digest)
    if treatment is not None and min(rgb.shape[:2]) >= treatment.size:
        data = equalized_bytes(record, data, rgb, treatment)
    return _Seen(record, check, traits_of(data), thumbnail_of(rgb))


def _corrupt(seen: _Seen, root: Path) -> CorruptPicture:
    r = seen.record
    return CorruptPicture(relative_path(r.path, root), r.label, r.generator, r.split, seen.check.reason)


def _class_stats(seen: Sequence[_Seen]) -> tuple[ClassStats, ...]:
    groups: dict[tuple[str, str, int], list[_Seen]] = defaultdict(list)
    for s in seen:
        groups[s.record.split or "", s.record.generator, s.record.label].append(s)
    return tuple(_stats_of(key, members) for key, members in sorted(groups.items()))


def _stats_of(key: tuple[str, str, int], members: Sequence[_Seen]) -> ClassStats:
    traits = [s.traits for s in members if s.traits is not None]
    jpegs = [t for t in traits if t.jpeg_tables]
    return ClassStats(
        split=key[0] or None,
        generator=key[1],
        label=key[2],
        pictures=len(traits),
        formats=_counted(t.format for t in traits),
        modes=_counted(t.mode for t in traits),
        sizes=_counted((f"{t.width_px}x{t.height_px}" for t in traits), 10),
        different_sizes=len({(t.width_px, t.height_px) for t in traits}),
        width_px=_spread([t.width_px for t in traits]),
        height_px=_spread([t.height_px for t in traits]),
        file_bytes=_spread([t.file_bytes for t in traits]),
        jpeg_quality=_spread([t.jpeg_quality for t in jpegs]) if jpegs else None,
        jpeg_tables=_counted((t.jpeg_tables for t in jpegs), 10),
        different_jpeg_tables=len({t.jpeg_tables for t in jpegs}),
        jpeg_subsampling=_counted(str(t.jpeg_subsampling) for t in jpegs),
        progressive_share=_share(t.jpeg_progressive for t in traits),
        exif_share=_share(t.exif for t in traits),
        icc_profile_share=_share(t.icc_profile for t in traits),
        exact_copies=len(members) - len({s.check.sha256 for s in members}),
    )


def _counted(values: Any, most: int | None = None) -> dict[str, int]:
    return dict(Counter(values).most_common(most))


def _spread(values: Sequence[int]) -> Spread:
    return Spread(min(values), float(np.median(values)), max(values))


def _share(flags: Any) -> float:
    return float(np.mean(list(flags)))


def _shortcuts(seen: Sequence[_Seen]) -> tuple[ShortcutResult, ...]:
    """For each split and generator with both classes: what trivial features reach, and a verdict."""
    groups: dict[tuple[str, str], list[_Seen]] = defaultdict(list)
    for s in seen:
        groups[s.record.split or "", s.record.generator].append(s)
    transferred = _transferred(seen)
    results = []
    for (split, generator), members in sorted(groups.items()):
        counts = Counter(s.record.label for s in members)
        if len(counts) < 2:
            continue
        records, traits = _split_up(members)
        found = set_auc(traits, records)
        verdict, finding, groups_alone = _verdict(found)
        results.append(
            ShortcutResult(
                split=split or None,
                generator=generator,
                real=counts[0],
                fake=counts[1],
                auc=None if found is None else found.auc,
                low=None if found is None else found.low,
                by_group={} if found is None else found.by_group,
                readable_groups=groups_alone,
                auc_learnt_on_train=transferred.get((split, generator)),
                verdict=verdict,
                finding=finding,
            )
        )
    return tuple(results)


def _verdict(found: Any) -> tuple[str, bool, tuple[str, ...]]:
    """The sentence, whether it is a finding, and the groups of features that suffice alone."""
    if found is None:
        return "too few pictures of both classes to say", False, ()
    alone = tuple(name for name in found.by_group if found.low_by_group[name] > FINDING_AUC)
    largest = max(found.auc, *(found.by_group[name] for name in alone), 0.0)
    if found.low <= FINDING_AUC and not alone:
        return "these features do not give the label away", False, ()
    source = " and off the ".join(alone) if alone else "file's features taken together"
    word = "can be read" if largest >= READABLE_AUC else "can in part be read"
    return f"the label {word} off the {source}", True, alone


def _transferred(seen: Sequence[_Seen]) -> dict[tuple[str, str], float]:
    """AUC on every other split of what was learnt on all of `train`, by split and generator."""
    trained = [s for s in seen if s.record.split == "train"]
    if len({s.record.label for s in trained}) < 2:
        return {}
    records, traits = _split_up(trained)
    labels = np.array([r.label for r in records], dtype=np.int64)
    found: dict[tuple[str, str], float] = {}
    for split in sorted({s.record.split or "" for s in seen} - {"train"}):
        others, theirs = _split_up([s for s in seen if (s.record.split or "") == split])
        aucs = transfer_aucs(traits, labels, theirs, others)
        found |= {(split, generator): auc for generator, auc in aucs.items()}
    return found


def _split_up(seen: Sequence[_Seen]) -> tuple[list[PictureRecord], list[Traits]]:
    return [s.record for s in seen], [s.traits for s in seen if s.traits is not None]


def _duplicates(
    seen: Sequence[_Seen], root: Path
) -> tuple[tuple[DuplicatePair, ...], tuple[DuplicatePair, ...], tuple[DuplicatePair, ...]]:
    """The same bytes in two splits, the same bytes with both labels, and near duplicates in two splits."""

    def pair(first: _Seen, second: _Seen, distance: int) -> DuplicatePair:
        mine, theirs = (relative_path(s.record.path, root) for s in (first, second))
        return DuplicatePair(mine, theirs, distance)

    by_hash: dict[str, list[_Seen]] = defaultdict(list)
    for s in seen:
        by_hash[s.check.sha256].append(s)
    copies = [members for members in by_hash.values() if len(members) > 1]
    across, contradictions = [], []
    for members in copies:
        first = members[0]
        across += [pair(first, s, 0) for s in members[1:] if s.record.split != first.record.split][:1]
        contradictions += [pair(first, s, 0) for s in members[1:] if s.record.label != first.record.label][:1]
    near = []
    for one, other in itertools.combinations(sorted({s.record.split or "" for s in seen}), 2):
        mine, theirs = ([s for s in seen if (s.record.split or "") == split] for split in (one, other))
        for i, j, distance in near_pairs(_thumbnails(mine), _thumbnails(theirs)):
            if mine[i].check.sha256 != theirs[j].check.sha256:
                near.append(pair(mine[i], theirs[j], distance))
    return tuple(across), tuple(contradictions), tuple(near)


def _thumbnails(seen: Sequence[_Seen]) -> list[NDArray[np.uint8]]:
    return [s.thumbnail for s in seen if s.thumbnail is not None]


def _findings(
    shortcuts: Sequence[ShortcutResult],
    corrupt: Sequence[CorruptPicture],
    across: Sequence[DuplicatePair],
    contradictions: Sequence[DuplicatePair],
    near: Sequence[DuplicatePair],
) -> tuple[str, ...]:
    """What a person has to know, in sentences."""
    found = [
        f"{f'{s.split} / ' if s.split else ''}{s.generator}: {s.verdict} (trivial AUC {s.auc:.2f})"
        for s in shortcuts
        if s.finding and s.auc is not None
    ]
    for what, members in (
        ("cannot be decoded", corrupt),
        ("are exact copies of pictures in another split", across),
        ("are in the set as real and as fake", contradictions),
        ("look the same as pictures in another split", near),
    ):
        if members:
            found.append(f"{len(members):,} pictures {what}")
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
