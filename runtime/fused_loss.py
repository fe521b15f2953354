"""Whether the training extension is built, read off its files: neither torch nor the extension is imported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

_PACKAGE = "cpp_ext"
_BUILD = "python -m cpp_ext.build"
# As in cpp_ext/library.py, which this must not import.
_SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
_RECORD_FIELDS = {
    "sources_sha256",
    "library_sha256",
    "torch",
    "torch_cuda",
    "cxx",
    "compilers",
    "instruction_sets",
    "cuda_targets",
    "cpu_only_reason",
}


@dataclass(frozen=True)
class FusedLoss:
    """The fused loss on this machine.

    Args:
        state: "missing" has never been built, "stale" was built from other sources, "damaged" is not the file that was
            built, "absent" means that the package is not installed.
        instruction_sets: of the CPU part.
        cuda_targets: compute capabilities of the CUDA part.
        detail: why it has no CUDA part, which source has changed, or what to run.
    """

    state: Literal["built", "missing", "stale", "damaged", "absent"]
    instruction_sets: tuple[str, ...] = ()
    cuda_targets: tuple[str, ...] = ()
    detail: str = ""

    def describe(self) -> str:
        """One line for a terminal."""
        if self.state != "built":
            return f"{self.state}: {self.detail}"
        targets = f"CUDA {' '.join(self.cuda_targets)}" if self.cuda_targets else f"no CUDA ({self.detail})"
        return f"built for {' '.join(self.instruction_sets)}; {targets}"


def probe_fused_loss() -> FusedLoss:
    """State of the library that `python -m cpp_ext.build` makes."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return FusedLoss("absent", detail=f"the package {_PACKAGE} is not installed")
    folder = Path(spec.origin).parent
    library = folder / "soft_contrastive.so"
    record = _record(folder / "soft_contrastive.json")
    if record is None or not library.is_file():
        return FusedLoss("missing", detail=f"training takes the reference loss; run {_BUILD}")
    if set(record) != _RECORD_FIELDS:
        return FusedLoss("stale", detail=f"its record is of another version; run {_BUILD}")
    try:
        built_for: dict[str, Any] = {
            "instruction_sets": tuple(record["instruction_sets"]),
            "cuda_targets": tuple(record["cuda_targets"]),
        }
        changed = _changed_source(folder, record["sources_sha256"])
        if changed is not None:
            return FusedLoss("stale", **built_for, detail=f"{changed} has changed since it was built; run {_BUILD}")
        if _sha256(library) != record["library_sha256"]:
            return FusedLoss("damaged", **built_for, detail=f"it is not the file that was built; run {_BUILD}")
        return FusedLoss("built", **built_for, detail=record["cpu_only_reason"])
    except (KeyError, TypeError, AttributeError):
        return FusedLoss("stale", detail=f"its record is of another version; run {_BUILD}")


def _record(path: Path) -> dict[str, Any] | None:
    """What the file holds, nothing where that makes no sense, or None where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _changed_source(folder: Path, recorded: dict[str, str]) -> str | None:
    """The first file that is new, gone or not what it was."""
    sources = (path for path in (folder / "csrc").glob("*") if path.suffix in _SOURCE_SUFFIXES and path.is_file())
    names = {*recorded, *(f"csrc/{path.name}" for path in sources)}
    for name in sorted(names):
        path = folder / name
        if not path.is_file() or _sha256(path) != recorded.get(name):
            return name
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
