"""Every picture decoded once before it is used: what cannot be decoded is listed and counted, never skipped in silence.

A check costs one decoding of each picture, so its result is kept by the hash of the picture's bytes (in
`$XDG_CACHE_HOME/ntf-toolkit`, else `~/.cache/ntf-toolkit`): later runs read and hash the files, which the data hash
needs anyway, and decode only what is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import PIL
from rich.progress import track

import runtime.decode
from runtime.errors import PictureError
from train.config import DEMO_DATA, RunConfig
from train.data import load_split, require_both_classes, scan_pictures
from train.data_csv import summary
from train.equalize import EqualizeConfig
from train.errors import DataError
from train.pictures import CorruptPicture, CorruptPolicy, PictureRecord, PictureSet, pixels_of, relative_path
from train.selection import Selection, selection_of

CORRUPT_FILE = "corrupt.json"
SHOWN = 20
CACHE_FOLDER = "ntf-toolkit"
CACHE_FILE = "decoded.sqlite"
# Results are stored in portions, so that a check that is stopped need not begin again.
PORTION = 500


@dataclass(frozen=True)
class Check:
    """What came of decoding one picture.

    Attributes:
        sha256: of its bytes; empty where they could not be read.
        reason: why it cannot be used; empty where it can.
        height: rows, 0 where it cannot be decoded.
        width: columns, likewise.
    """

    sha256: str
    reason: str
    height: int = 0
    width: int = 0


def data_source(name: str) -> Path:
    """Collection that a run's configuration names; the demo data are built when they are missing."""
    if name != DEMO_DATA:
        return Path(name)
    from train.demo_data import ensure_demo_data  # loads scikit-image, which nothing else needs

    return ensure_demo_data()


def split_of_run(config: RunConfig, source: Path | str, split: str, *, own: bool = True) -> PictureSet:
    """The pictures of a split as a run takes them: checked, and equalised where its configuration says so.

    Args:
        config: of the run.
        source: collection.
        split: name of the split.
        own: `source` is the run's own collection, of which its configuration selects a part.

    Raises:
        DataError: as `checked_split`.
        ConfigError: a selected generator is not in that split.
    """
    return checked_split(
        source,
        split,
        corrupt=config.corrupt,
        equalize=config.equalize,
        workers=config.workers,
        selection=selection_of(config, split) if own else None,
    )


def checked_split(
    source: Path | str,
    split: str | None,
    *,
    corrupt: CorruptPolicy = "refuse",
    equalize: EqualizeConfig | None = None,
    workers: int = 0,
    progress: bool = True,
    require_both: bool = True,
    selection: Selection | None = None,
) -> PictureSet:
    """The pictures of one split, or of all, that training and evaluation can use.

    Args:
        source: collection.
        split: name of the split; None for the whole collection.
        corrupt: what to do where pictures cannot be decoded.
        equalize: treatment of both classes, which the records then carry.
        workers: threads that decode; 0 and 1 are one.
        progress: show a progress bar.
        require_both: refuse pictures of one class only.
        selection: the part to take; the others are not looked at.

    Raises:
        DataError: as `train.data.load_split`; or pictures are corrupt, or smaller than the equalised crop.
    """
    subject = str(source) if split is None else f"split {split!r} of {source}"
    if split is None:
        found = scan_pictures(source, require_both=require_both)
    else:
        found = load_split(source, split, require_both=require_both)
    if selection is not None:
        found = selection.of(found)
        subject = selection.describe(subject)
    if require_both:
        require_both_classes(found, subject)
    usable = checked(found, corrupt=corrupt, equalize=equalize, workers=workers, progress=progress)
    if require_both:
        require_both_classes(usable, f"{subject} without its corrupt pictures")
    return usable


def checked(
    pictures: PictureSet,
    *,
    corrupt: CorruptPolicy = "refuse",
    equalize: EqualizeConfig | None = None,
    workers: int = 0,
    progress: bool = True,
) -> PictureSet:
    """The pictures that can be decoded, with their hashes, and a list of the others.

    Args:
        pictures: a collection.
        corrupt: "refuse" raises where there are others, "skip" leaves them out.
        equalize: treatment that the records are to carry.
        workers: threads that decode; 0 and 1 are one.
        progress: show a progress bar.

    Raises:
        DataError: corrupt pictures that may not be left out, nothing but corrupt ones, or some that are smaller than
            the equalised crop.
    """
    checks = check_records(pictures.records, workers=workers, progress=progress)
    pairs = list(zip(pictures.records, checks, strict=True))
    broken = tuple(_corrupt(record, check, pictures.root) for record, check in pairs if check.reason)
    if broken and corrupt == "refuse":
        raise _refusal(pictures, broken)
    if len(broken) == len(pairs):
        raise DataError(
            f"pictures of {pictures.root}",
            got=f"{len(pairs):,}, none of which can be decoded ({broken[0].path}: {broken[0].reason})",
            wanted="pictures",
            remedy="fetch them again",
        )
    treatment = equalize if equalize is not None and equalize.enabled else None
    if treatment is not None:
        require_size(pictures.root, pairs, treatment)
    usable = tuple(replace(r, sha256=c.sha256, equalize=treatment) for r, c in pairs if not c.reason)
    return replace(pictures, records=usable, corrupt=pictures.corrupt + broken)


def check_records(records: Sequence[PictureRecord], *, workers: int = 0, progress: bool = True) -> list[Check]:
    """What comes of decoding each picture, in their order; known results are taken from the cache.

    Raises:
        DataError: a shard is damaged.
        PictureError: no memory is left, which says nothing about the picture.
    """
    checks: list[Check] = []
    portions = range(0, len(records), PORTION)
    with _cache() as cache, ThreadPoolExecutor(max(1, workers)) as pool:
        known = cache.known() if cache else {}
        for start in track(portions, "checking pictures", disable=not progress or len(records) <= PORTION):
            portion = list(pool.map(partial(_check, known=known), records[start : start + PORTION]))
            fresh = [check for check in portion if check.sha256 and check.sha256 not in known]
            if cache and fresh:
                cache.add(fresh)
            checks += portion
    return checks


def corrupt_counts(broken: Sequence[CorruptPicture]) -> list[dict[str, object]]:
    """How many pictures were left out, for each split, generator and class."""
    counts = Counter((p.split or "", p.generator, p.label) for p in broken)
    return [
        {"split": split or None, "generator": generator, "label": label, "pictures": count}
        for (split, generator, label), count in sorted(counts.items())
    ]


def _check(record: PictureRecord, known: dict[str, Check]) -> Check:
    try:
        data = record.read_bytes()
    except PictureError as error:
        return Check("", error.got)
    digest = record.digest(data)
    if digest in known:
        return known[digest]
    try:
        height, width, _ = pixels_of(record, data).shape
    except PictureError as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return Check(digest, error.got)
    return Check(digest, "", height, width)


def _corrupt(record: PictureRecord, check: Check, root: Path) -> CorruptPicture:
    path = relative_path(record.path, root)
    return CorruptPicture(path, record.label, record.generator, record.split, check.reason)


def _refusal(pictures: PictureSet, broken: Sequence[CorruptPicture]) -> DataError:
    counts = Counter(f"{'fake' if p.label else 'real'} of {p.generator}" for p in broken)
    shown = summary([f"{p.path}: {p.reason}" for p in broken], SHOWN)
    return DataError(
        f"pictures of {pictures.root}",
        got=f"{len(broken):,} of {len(pictures):,} that cannot be decoded "
        f"({', '.join(f'{count:,} {name}' for name, count in sorted(counts.items()))}): {shown}",
        wanted="pictures that can be decoded",
        remedy="replace them, or leave them out with --corrupt skip, which lists them in the run or report",
    )


def require_size(root: Path, pairs: Sequence[tuple[PictureRecord, Check]], config: EqualizeConfig) -> None:
    """Refuse pictures without room for the equalised crop.

    Args:
        root: of the collection, for the error.
        pairs: pictures and what came of decoding them.
        config: size of the crop.

    Raises:
        DataError: with the counts of both classes, and the size that would do.
    """
    small = [(r, c) for r, c in pairs if not c.reason and min(c.height, c.width) < config.size]
    if not small:
        return
    fakes = sum(record.label for record, _ in small)
    largest = min(min(c.height, c.width) for _, c in pairs if not c.reason)
    shown = summary([f"{relative_path(r.path, root)}: {c.width}x{c.height}" for r, c in small])
    raise DataError(
        f"--equalize-size {config.size}",
        got=f"{len(small) - fakes:,} real and {fakes:,} fake pictures in {root} that are smaller ({shown})",
        wanted="a crop that every picture has room for: padding would tell the classes apart",
        remedy=f"pass --equalize-size {largest}, which all of these have room for, or leave the small ones out",
    )


class _Cache:
    """Results of earlier checks by content hash, for this decoder."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.decoder = decoder_id()
        self.database = sqlite3.connect(path, timeout=60)
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS checks (decoder TEXT, sha256 TEXT, reason TEXT, height INTEGER, width INTEGER, "
            "PRIMARY KEY (decoder, sha256)) WITHOUT ROWID"
        )

    def known(self) -> dict[str, Check]:
        """Everything that this decoder has been asked before."""
        rows = self.database.execute(
            "SELECT sha256, reason, height, width FROM checks WHERE decoder = ?", (self.decoder,)
        )
        return {row[0]: Check(*row) for row in rows}

    def add(self, checks: Sequence[Check]) -> None:
        """Keep further results."""
        rows = [(self.decoder, c.sha256, c.reason, c.height, c.width) for c in checks]
        with self.database:
            self.database.executemany("INSERT OR REPLACE INTO checks VALUES (?, ?, ?, ?, ?)", rows)


def decoder_id() -> str:
    """What a result depends on besides the picture's bytes: Pillow's version and our decoding code."""
    code = Path(runtime.decode.__file__).read_bytes()
    return f"pillow {PIL.__version__} decode {hashlib.sha256(code).hexdigest()[:16]}"


def cache_path() -> Path:
    """Where results are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / CACHE_FOLDER / CACHE_FILE


@contextlib.contextmanager
def _cache() -> Iterator[_Cache | None]:
    """The cache, or None, with a note, where there can be none: checks then decode everything again."""
    try:
        cache = _Cache(cache_path())
        cache.known()
    except (OSError, sqlite3.Error) as error:
        print(f"note: checks of pictures are not kept in {cache_path()} ({error})", file=sys.stderr)
        yield None
        return
    try:
        yield cache
    finally:
        cache.database.close()
