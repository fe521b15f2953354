"""The compiled library of the fused loss on disk: where it lies, what it was built from, whether it may be loaded.

    soft_contrastive.so     the library
    soft_contrastive.json   what it was built from and for; `ntf doctor` reads it too

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY_FILE = "soft_contrastive.so"
RECORD_FILE = "soft_contrastive.json"
BUILD_COMMAND = "python -m cpp_ext.build"
# What a library is made of; an editor's swap file beside them is not. `runtime/fused_loss.py` goes by the same.
SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The fused loss cannot be built or loaded; its text is one full sentence.

    Args:
        subject: what the error is about, for example a file name.
        got: what was found.
        wanted: what would have been accepted.
        remedy: what the reader can do about it.
    """

    def __init__(self, subject: str, *, got: str, wanted: str, remedy: str) -> None:
        self.subject = subject
        self.got = got
        self.wanted = wanted
        self.remedy = remedy
        super().__init__(f"{subject}: got {got}, wanted {wanted}: {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by positional args; worker processes send these back with keywords.
        return _rebuild, (type(self), self.subject, self.got, self.wanted, self.remedy)


def _rebuild(kind: type[BuildError], subject: str, got: str, wanted: str, remedy: str) -> BuildError:
    return kind(subject, got=got, wanted=wanted, remedy=remedy)


@dataclass(frozen=True)
class BuildRecord:
    """What a library was built from and for.

    Args:
        sources_sha256: of each file in csrc, and of build.py and toolchain.py, which hold the flags; by path below the
            package.
        library_sha256: of the library.
        torch: version whose headers were used.
        torch_cuda: CUDA version of that torch, None for a CPU build.
        cxx: the words with which the C++ compiler's command begins, as CXX gives them.
        compilers: version of each compiler that ran, by name.
        instruction_sets: of the CPU part; the processor's best is chosen when it runs.
        cuda_targets: compute capabilities of the CUDA part, "90" for sm_90; empty without it.
        cpu_only_reason: why there is no CUDA part, or "".
    """

    sources_sha256: dict[str, str]
    library_sha256: str
    torch: str
    torch_cuda: str | None
    cxx: tuple[str, ...]
    compilers: dict[str, str]
    instruction_sets: tuple[str, ...]
    cuda_targets: tuple[str, ...]
    cpu_only_reason: str

    def describe(self) -> str:
        """One line: instruction sets and CUDA targets."""
        targets = f"CUDA {' '.join(self.cuda_targets)}" if self.cuda_targets else f"no CUDA ({self.cpu_only_reason})"
        return f"{' '.join(self.instruction_sets)}; {targets}"

    def to_json(self) -> str:
        """Text of the record's file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1) + "\n"


def read_record(folder: Path = FOLDER) -> BuildRecord | None:
    """Record beside the library in `folder`; None where there is none, or none that this version understands."""
    try:
        values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        for name in ("cxx", "instruction_sets", "cuda_targets"):
            values[name] = tuple(values[name])
        values["sources_sha256"] = dict(values["sources_sha256"])
        return BuildRecord(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def loadable_record(folder: Path = FOLDER, *, torch_version: str, torch_cuda: str | None) -> BuildRecord:
    """Record of the library in `folder`, which a torch may load; loading and `--check` both ask here.

    Args:
        folder: the package's, with csrc in it.
        torch_version: of that torch, for the error.
        torch_cuda: CUDA version of that torch, None for a CPU build.

    Raises:
        BuildError: missing, stale, damaged, or with a CUDA part for another major version.
    """
    problem, record = library_problem(folder), read_record(folder)
    if problem is not None or record is None:
        raise refused_library(problem or "no library, it has not been built")
    theirs, mine = (version and version.partition(".")[0] for version in (record.torch_cuda, torch_cuda))
    if record.cuda_targets and theirs != mine:
        raise refused_library(f"a library for CUDA {theirs} beside torch {torch_version}")
    return record


def refused_library(got: str) -> BuildError:
    """The error about a library that is not loaded for the reason `got`."""
    return BuildError("the fused loss", got=got, wanted="a current library", remedy=f"run {BUILD_COMMAND}")


def library_problem(folder: Path = FOLDER) -> str | None:
    """What is wrong with the files in `folder`, whichever torch may load them, as a phrase, or None."""
    record = read_record(folder)
    library = folder / LIBRARY_FILE
    if not (library.is_file() and (folder / RECORD_FILE).is_file()):
        return "no library, it has not been built"
    if record is None:
        return "a stale library, its record is of another version"
    now = source_hashes(folder)
    changed = sorted(
        name for name in {*now, *record.sources_sha256} if now.get(name) != record.sources_sha256.get(name)
    )
    if changed:
        return f"a stale library, {changed[0]} has changed since it was built"
    if file_sha256(library) != record.library_sha256:
        return "a damaged library, it is not the file that was built"
    return None


def source_hashes(folder: Path = FOLDER) -> dict[str, str]:
    """SHA-256 of everything that the library is made of, by path below `folder`."""
    sources = (path for path in (folder / "csrc").glob("*") if path.suffix in SOURCE_SUFFIXES)
    files = [*sorted(sources), folder / "build.py", folder / "toolchain.py"]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files if path.is_file()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def reading_lock(folder: Path = FOLDER) -> Iterator[None]:
    """Holds off builds in `folder` while library and record are read, and waits for one that is at work."""
    handle = _folder_handle(folder / "csrc")
    if handle is None or sys.platform == "win32":
        yield  # nothing was built here
        return
    import fcntl  # not on Windows

    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("a build is at work in %s: waiting for its end", folder)
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:
            # A file system without locks: a build in this moment is then seen as a damaged library at worst.
            _log.debug("no lock on %s", folder, exc_info=True)
        yield
    finally:
        # Closing is not enough where the process was forked meanwhile: the child has the handle too.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _folder_handle(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None
