"""The folder beside a results file in which scoring leaves what is done, so that it can go on after any stop.

    results.csv.parts/
      listing.jsonl        the pictures, one a line
      journal.json         what the scores depend on; nothing counts before it is there
      part-00000012.jsonl  rows of one part of the listing; it is there complete or not at all
      merged               the results file, before it takes its place

Every file is written under another name, flushed to the disk and renamed. A part is scored when it is not there, and
never again when it is. When all are there they are merged, the journal says so, the merged file takes its place, and
the folder goes, its journal last: at whatever step a process is killed, the next one can tell what is left to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from runtime.errors import BundleError, CollectionError
from runtime.scoring.listing import ListingSpec, lines_of, parts_of, picture_from_line, write_listing
from runtime.scoring.results import write_results
from runtime.scoring.rows import Row, row_from_line, row_name, row_to_line
from runtime.scoring.sources import Picture
from runtime.strict_json import canonical_json, from_jsonable, parse_json

JOURNAL_FILE, LISTING_FILE, MERGED_FILE = "journal.json", "listing.jsonl", "merged"
FOLDER_SUFFIX = ".parts"

_UNFINISHED = ".new"
_PART_NAME = re.compile(r"part-\d{8}\.jsonl(\.new)?")


@dataclass(frozen=True)
class Configuration:
    """What the rows depend on: a scoring goes on only where all of it is as it was.

    Args:
        source: absolute path of the collection.
        pictures: how many there are.
        listing_sha256: of their names and order.
        part_size: pictures of a part.
        model: name of the model.
        model_sha256: of the bundle's manifest, which holds the hash of every file.
        backend: that scores.
        precision: of the graph.
        tool_version: of the toolkit.
    """

    source: str
    pictures: int
    listing_sha256: str
    part_size: int
    model: str
    model_sha256: str
    backend: str
    precision: str
    tool_version: str


@dataclass(frozen=True)
class Journal:
    """The state of a scoring.

    Args:
        configuration: that it was begun with.
        failed: rows with an error, once all are merged; None before.
    """

    configuration: Configuration
    failed: int | None


def is_begun(out: Path) -> bool:
    """Whether there is something to go on with for a results file."""
    return (_folder(out) / JOURNAL_FILE).exists()


class Work:
    """The work folder of one results file, held by this process until it is closed.

    Args:
        out: results file; its folder must exist.

    Raises:
        CollectionError: another process works on it, it cannot be made, or its journal is damaged.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = _folder(out)
        self._lock = _locked(self.folder)
        try:
            self.journal = self._read_journal()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Lets other processes work on the results file; the folder goes where nothing was begun."""
        if self.journal is None:
            (self.folder / f"{LISTING_FILE}{_UNFINISHED}").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # parts of an earlier, unfinished removal stay for the next one
                self.folder.rmdir()
        os.close(self._lock)

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def list_pictures(self, pictures: Iterable[Picture]) -> ListingSpec:
        """Writes down what the collection holds now, for `begin`.

        Raises:
            NTFError: as `pictures` raises it.
        """
        path = self.folder / f"{LISTING_FILE}{_UNFINISHED}"
        try:
            return write_listing(path, pictures)
        except OSError as error:
            _refuse(path, f"a file that cannot be written ({error.strerror})", "room on the disk", "make room")

    def begin(self, configuration: Configuration) -> None:
        """Starts with the pictures that were listed last, or goes on with what is there.

        Raises:
            CollectionError: what is there was begun with another configuration.
        """
        listed = self.folder / f"{LISTING_FILE}{_UNFINISHED}"
        if self.journal is not None:
            listed.unlink()
            self._require_same(self.journal.configuration, configuration)
            return
        self._remove_parts()
        listed.replace(self.folder / LISTING_FILE)
        self._write_journal(Journal(configuration, None))

    @property
    def configuration(self) -> Configuration:
        """As begun."""
        assert self.journal is not None
        return self.journal.configuration

    def part_length(self, number: int) -> int:
        """Pictures of a part; all have the same but the last, which may have fewer."""
        size = self.configuration.part_size
        return min(size, self.configuration.pictures - number * size)

    def missing(self) -> set[int]:
        """Numbers of the parts that have no rows yet."""
        if self.journal is not None and self.journal.failed is not None:
            return set()
        done = {int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.jsonl")}
        return set(range(-(-self.configuration.pictures // self.configuration.part_size))) - done

    def listed(self, wanted: set[int]) -> Iterator[tuple[int, Iterator[str]]]:
        """Number of each wanted part with its lines of the listing, in order."""
        # Nothing is wanted where a process was killed while it removed what is not needed any more, the listing first.
        return parts_of(self.folder / LISTING_FILE, self.configuration.part_size, wanted) if wanted else iter(())

    def commit(self, number: int, rows: Iterable[Row]) -> None:
        """Keeps the rows of a part.

        Raises:
            CollectionError: they are not as many as the part has pictures, or cannot be written.
        """
        lines = [row_to_line(row) for row in rows]
        if len(lines) != self.part_length(number):
            _refuse(self.folder, f"{len(lines)} rows of part {number}", f"{self.part_length(number)} rows")
        _write(self._part(number), "".join(f"{line}\n" for line in lines))

    def finish(self) -> int:
        """Writes the results file, removes the folder, and says how many rows have an error.

        Raises:
            CollectionError: a part does not hold the rows of its pictures, or the file cannot be written.
        """
        assert self.journal is not None
        merged, failed = self.folder / MERGED_FILE, self.journal.failed
        if failed is None:
            failed = self._merge(merged)
            self._write_journal(Journal(self.configuration, failed))
        if merged.exists():  # not where the process before this one was killed after this step
            merged.replace(self.out)
            _sync_folder(self.out.parent)
        self._remove_parts()
        (self.folder / LISTING_FILE).unlink(missing_ok=True)
        (self.folder / JOURNAL_FILE).unlink()
        self.journal = None
        return failed

    def _merge(self, merged: Path) -> int:
        failed = 0

        def counted() -> Iterator[Row]:
            nonlocal failed
            for row in self._rows():
                failed += row.error is not None
                yield row

        try:
            write_results(merged, counted(), suffix=self.out.suffix.lower())
        except OSError as error:
            _refuse(self.out, f"a file that cannot be written ({error.strerror})", "room on the disk", "make room")
        return failed

    def _rows(self) -> Iterator[Row]:
        """All rows in order, each compared with the listing, so that none is lost, repeated or of another picture."""
        lines = lines_of(self.folder / LISTING_FILE)
        for number in range(-(-self.configuration.pictures // self.configuration.part_size)):
            path = self._part(number)
            try:
                rows = [row_from_line(line) for line in path.read_text(encoding="ascii").splitlines()]
            except (OSError, ValueError, TypeError) as error:
                _refuse(path, f"a file that cannot be read ({error})", "the rows of a part", _REMOVE_PART)
            names = [row_name(picture_from_line(next(lines))) for _ in range(self.part_length(number))]
            if [row.source for row in rows] != names:
                _refuse(path, f"{len(rows)} rows", f"one for each of its {len(names)} pictures", _REMOVE_PART)
            yield from rows

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.jsonl"

    def _remove_parts(self) -> None:
        for path in self.folder.iterdir():
            if _PART_NAME.fullmatch(path.name) or path.name == MERGED_FILE:
                path.unlink()

    def _read_journal(self) -> Journal | None:
        path = self.folder / JOURNAL_FILE
        try:
            return from_jsonable(Journal, parse_json(path.read_text(encoding="utf-8"), subject=str(path)), subject="")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, BundleError) as error:
            _refuse(path, f"a journal that cannot be read ({error})", "the journal of a scoring", self._start_again())

    def _write_journal(self, journal: Journal) -> None:
        _write(self.folder / JOURNAL_FILE, canonical_json(asdict(journal)))
        self.journal = journal

    def _require_same(self, begun: Configuration, now: Configuration) -> None:
        before, after = asdict(begun), asdict(now)
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            told = "; ".join(f"{name} was {before[name]} and is {after[name]}" for name in changed)
            _refuse(self.folder, f"rows of another configuration ({told})", "the same as before", self._start_again())

    def _start_again(self) -> str:
        return f"score as before, choose another --out, or remove {self.folder} to begin again"


_REMOVE_PART = "remove this file and run the same command again"


def _folder(out: Path) -> Path:
    return out.with_name(out.name + FOLDER_SUFFIX)


def _locked(folder: Path) -> int:
    """Descriptor of the folder, which is made, locked until the descriptor is closed or the process ends."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        _refuse(folder, f"a folder that cannot be made ({error.strerror})", "a place to keep what is done", "see to it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        _refuse(folder, "a scoring in progress", "one process for a results file", "wait for it, or stop it")
    if not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
        os.close(descriptor)
        _refuse(folder, "a scoring that ended this very moment", "one process for a results file")
    return descriptor


def _write(path: Path, text: str) -> None:
    """Writes a file: complete and on the disk, or not at all."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _refuse(
            path, f"a file that cannot be written ({error.strerror})", "room on the disk", "make room; run it again"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(subject: object, got: str, wanted: str, remedy: str = "run the same command again") -> NoReturn:
    raise CollectionError(str(subject), got=got, wanted=wanted, remedy=remedy)
