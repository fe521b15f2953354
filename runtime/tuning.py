"""Times of the back-ends on this machine: measured by `ntf tune`, kept for this user, and read by `backend="auto"`.

A measurement counts for the bundle, the machine and the versions that it was made with, and for no others.
"""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.base import installed_version
from runtime.backends.cuda_driver import cuda_device
from runtime.errors import BundleError, UsageError
from runtime.manifest import ModelManifest, manifest_to_json
from runtime.replacing import replacing
from runtime.strict_json import canonical_json, from_jsonable, parse_json, to_jsonable
from runtime.user_cache import made_cache, user_cache

SCHEMA_VERSION = 1
_FOLDER = "tuning"
BATCHES = (1, 8)
# Packages whose version changes what a time means.
_PACKAGES = (
    "ntf-toolkit", "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx", "openvino", "tensorrt",
    "tensorrt-rtx", "cuda-bindings", "pycuda",
)  # fmt: skip


@dataclass(frozen=True)
class BatchTime:
    """Time of one inference.

    Args:
        batch: pictures.
        repeats: inferences that were timed.
        median_ms: of one inference.
        low_ms: a quarter of them took at most this.
        high_ms: a quarter of them took at least this.
    """

    batch: int
    repeats: int
    median_ms: float
    low_ms: float
    high_ms: float

    @property
    def picture_ms(self) -> float:
        """Median time of one picture."""
        return self.median_ms / self.batch


@dataclass(frozen=True)
class Timing:
    """Times of an artifact on a back-end, one for each of BATCHES, smallest batch first."""

    backend: str
    precision: str
    artifact: str
    times: tuple[BatchTime, ...]

    def described(self) -> str:
        """In a few words, for example "openvino int8 at 4.98 ms a picture in batches of 8"."""
        last = self.times[-1]
        return f"{self.backend} {self.precision} at {last.picture_ms:.3g} ms a picture in batches of {last.batch}"


@dataclass(frozen=True)
class Tuning:
    """What `ntf tune` measured.

    Args:
        schema_version: of this layout.
        bundle_sha256: of the manifest, which has the hash of every file.
        machine: processor, number of logical processors, GPU.
        versions: of the packages that were installed.
        measured: date, for people.
        timings: what was measured.
        failed: what could not be, with the reason.
    """

    schema_version: int
    bundle_sha256: str
    machine: dict[str, str]
    versions: dict[str, str]
    measured: str
    timings: tuple[Timing, ...]
    failed: dict[str, str]

    def by_speed(self) -> list[Timing]:
        """The timings, fastest at the largest batch first."""
        return sorted(self.timings, key=lambda timing: timing.times[-1].picture_ms)


def this_machine() -> dict[str, str]:
    """What of this machine a time depends on."""
    gpu = cuda_device()
    return {
        "processor": _processor(),
        "logical_processors": str(os.cpu_count() or 1),
        "gpu": "none" if gpu is None else f"{gpu.name} ({gpu.target})",
        "system": f"{platform.system()} {platform.machine()}",
    }


def these_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a time depends on, as far as they are installed."""
    found = {name: installed_version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def bundle_sha256(manifest: ModelManifest) -> str:
    """SHA-256 of a bundle's manifest, and so of the bundle."""
    return hashlib.sha256(manifest_to_json(manifest).encode()).hexdigest()


def tuning_path(manifest: ModelManifest) -> Path:
    """File that the tuning of a bundle is kept in."""
    return user_cache() / _FOLDER / f"{bundle_sha256(manifest)}.json"


def keep_tuning(manifest: ModelManifest, tuning: Tuning) -> Path:
    """Writes what was measured, complete or not at all, in place of an earlier measurement.

    Raises:
        UsageError: the folder cannot be written.
    """
    made_cache(_FOLDER)
    path, text = tuning_path(manifest), canonical_json(to_jsonable(tuning, subject="tuning"))
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UsageError(
            str(path), got=f"a file that cannot be written ({error.strerror})", wanted="a writable cache folder",
            remedy="set XDG_CACHE_HOME to one",
        ) from error  # fmt: skip
    return path


def kept_tuning(manifest: ModelManifest) -> tuple[Tuning | None, str]:
    """What was measured for a bundle, if it counts here; otherwise None, and why not ("" where nothing was)."""
    try:
        path = tuning_path(manifest)
    except UsageError:
        return None, ""  # there is no folder that anything could have been kept in
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, ""
    except (OSError, UnicodeDecodeError) as error:
        return None, f"`ntf tune` is ignored: {path} cannot be read ({error})"
    try:
        tuning = from_jsonable(Tuning, parse_json(text, subject=path.name), subject=path.name)
    except BundleError as error:
        return None, f"`ntf tune` is ignored: {path} is not what this version writes ({error.subject}: got {error.got})"
    changes = _changes(tuning, manifest)
    return (None, f"`ntf tune` of {tuning.measured} is ignored: {'; '.join(changes)}") if changes else (tuning, "")


def clear_tuning(manifest: ModelManifest) -> bool:
    """Whether there was a measurement of a bundle, which is gone now."""
    with suppress(FileNotFoundError):
        tuning_path(manifest).unlink()
        return True
    return False


def _changes(tuning: Tuning, manifest: ModelManifest) -> list[str]:
    """Why a measurement does not count here; empty where it does."""
    if tuning.schema_version != SCHEMA_VERSION:
        return [f"it has schema {tuning.schema_version}, and this version writes {SCHEMA_VERSION}"]
    if tuning.bundle_sha256 != bundle_sha256(manifest):
        return ["it is of another bundle"]
    if not tuning.timings or any(not timing.times for timing in tuning.timings):
        return ["it has no times"]
    pairs = ((tuning.machine, this_machine()), (tuning.versions, these_versions()))
    return [
        f"{name} was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for then, now in pairs
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _processor() -> str:
    """Name of the processor: Linux says it in /proc/cpuinfo, `platform` elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
