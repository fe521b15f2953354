"""The compiled library of the fused loss on disk: where it lies, what it was built from, whether it may be loaded.

    soft_contrastive.so     the library
    soft_contrastive.json   what it was built from and for; `ntf doctor` reads it too

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY_FILE = "soft_contrastive.so"
RECORD_FILE = "soft_contrastive.json"
BUILD_COMMAND = "python -m cpp_ext.build"


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
        sources_sha256: of each file in csrc and of build.py, which holds the flags, by path below the package.
        library_sha256: of the library.
        torch: version whose headers were used.
        torch_cuda: CUDA version of that torch, None for a CPU build.
        compilers: version of each compiler that ran, by name.
        instruction_sets: of the CPU part; the processor's best is chosen when it runs.
        cuda_targets: compute capabilities of the CUDA part, "90" for sm_90; empty without it.
        cpu_only_reason: why there is no CUDA part, or "".
    """

    sources_sha256: dict[str, str]
    library_sha256: str
    torch: str
    torch_cuda: str | None
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
        values["instruction_sets"] = tuple(values["instruction_sets"])
        values["cuda_targets"] = tuple(values["cuda_targets"])
        return BuildRecord(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def library_problem(folder: Path = FOLDER) -> str | None:
    """What is wrong with the library in `folder`, as a phrase, or None where it may be loaded."""
    record = read_record(folder)
    library = folder / LIBRARY_FILE
    if record is None or not library.is_file():
        return "no library, it has not been built"
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
    files = [*sorted(path for path in (folder / "csrc").glob("*") if path.is_file()), folder / "build.py"]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files if path.is_file()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
