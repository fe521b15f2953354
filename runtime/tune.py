"""Measure which back-end is fastest here: `ntf tune`."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backends import BACKENDS, Backend, open_backend, probe_backend
from runtime.backends.choice import safe_artifacts
from runtime.bundle import Bundle
from runtime.errors import BackendError, NTFError, UsageError
from runtime.manifest import ArtifactSpec
from runtime.tuning import (
    BATCHES,
    SCHEMA_VERSION,
    BatchTime,
    Timing,
    Tuning,
    bundle_sha256,
    keep_tuning,
    these_versions,
    this_machine,
)

REPEATS = 20
_WARM_UP = 3
_MS = 1e3


@dataclass
class _Contender:
    """A back-end with an artifact, and the seconds that each batch took so far."""

    backend: Backend
    artifact: ArtifactSpec
    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})

    @property
    def name(self) -> str:
        return f"{self.backend.name} {self.artifact.precision}"

    def run(self, images: NDArray[np.uint8]) -> float:
        """Seconds of one inference."""
        started = time.perf_counter()
        self.backend.infer(images)
        return time.perf_counter() - started


def measured(bundle: Bundle, *, repeats: int = REPEATS, say: Callable[[str], None]) -> Tuning:
    """Times of each back-end that runs here with each precision that it may take by itself; they are kept as well.

    Args:
        bundle: opened; its artifacts that are FP32, or passed their parity check, are measured.
        repeats: inferences of each batch that are timed, in turns, so that a slow moment hits all alike.
        say: is told what happens.

    Raises:
        BackendError: nothing could be measured.
        UsageError: repeats is not positive, or the times cannot be kept.
    """
    if repeats < 1:
        raise UsageError("--repeats", got=str(repeats), wanted="at least 1", remedy="leave it out for the default")
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        contenders: list[_Contender] = []
        for name in BACKENDS:
            contenders += _opened(bundle, name, failed, stack, say)
        images = _noise(bundle)
        contenders = [contender for contender in contenders if _warmed(contender, images, failed, say)]
        if not contenders:
            raise BackendError(
                f"tuning of {bundle.location}",
                got=f"nothing that could be measured ({'; '.join(f'{k}: {v}' for k, v in failed.items())})",
                wanted="a back-end that runs here, and a precision that it may take",
                remedy="see `ntf doctor` and `ntf inspect`",
            )
        say(f"timing {len(contenders)} in turns, {repeats} times")
        for _ in range(repeats):
            for contender in contenders:
                # Threads of the back-end before spin for a while; that time is nobody's.
                contender.run(images)
                for batch in BATCHES:
                    contender.seconds[batch].append(contender.run(images[:batch]))
    tuning = Tuning(
        schema_version=SCHEMA_VERSION,
        bundle_sha256=bundle_sha256(bundle.manifest),
        machine=this_machine(),
        versions=these_versions(),
        measured=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        timings=tuple(_timing(contender) for contender in contenders),
        failed=failed,
    )
    say(f"kept in {keep_tuning(bundle.manifest, tuning)}, where --backend auto reads it")
    return tuning


def tuning_text(tuning: Tuning) -> str:
    """A tuning as a table for a terminal, fastest first."""
    columns = "".join(f"  {f'batch {batch}, ms':>26}" for batch in BATCHES)
    lines = [f"measured {tuning.measured} on {tuning.machine['processor']}, GPU {tuning.machine['gpu']}"]
    lines.append(f"{'back-end':<26}{columns}   (median, quartiles)")
    for timing in tuning.by_speed():
        cells = (f"{t.median_ms:.2f} ({t.low_ms:.2f} to {t.high_ms:.2f})" for t in timing.times)
        lines.append(f"{timing.backend + ' ' + timing.precision:<26}" + "".join(f"  {cell:>26}" for cell in cells))
    return "\n".join([*lines, *(f"{name}: not measured: {reason}" for name, reason in sorted(tuning.failed.items()))])


def _opened(
    bundle: Bundle, name: str, failed: dict[str, str], stack: ExitStack, say: Callable[[str], None]
) -> list[_Contender]:
    """A back-end with each artifact that it may take; what does not run or open is noted."""
    probe = probe_backend(name)
    artifacts = safe_artifacts(bundle.manifest, name) if probe.runs else []
    if not artifacts:
        failed[name] = probe.reason if not probe.runs else "the bundle has nothing that it may take by itself"
    contenders: list[_Contender] = []
    for artifact in artifacts:
        say(f"opening {artifact.file} on {name}")
        try:
            opened = open_backend(name, bundle.read(artifact), bundle.manifest, file=artifact.file)
        except NTFError as error:
            failed[f"{name} {artifact.precision}"] = str(error)
            continue
        stack.callback(opened.close)
        contenders.append(_Contender(opened, artifact))
    return contenders


def _warmed(
    contender: _Contender, images: NDArray[np.uint8], failed: dict[str, str], say: Callable[[str], None]
) -> bool:
    """Whether a contender scores every batch; what it does for the first time is not timed."""
    try:
        for batch in BATCHES * _WARM_UP:
            contender.run(images[:batch])
    except NTFError as error:
        failed[contender.name] = str(error)
        say(f"{contender.name} failed: {error}")
        return False
    return True


def _noise(bundle: Bundle) -> NDArray[np.uint8]:
    size = bundle.manifest.preprocess
    return np.random.default_rng(0).integers(0, 256, (max(BATCHES), size.height, size.width, 3), dtype=np.uint8)


def _timing(contender: _Contender) -> Timing:
    artifact = contender.artifact
    times = tuple(_batch_time(batch, seconds) for batch, seconds in contender.seconds.items())
    return Timing(contender.backend.name, artifact.precision, artifact.file, times)


def _batch_time(batch: int, seconds: list[float]) -> BatchTime:
    low, median, high = (float(value) for value in np.quantile(np.array(seconds) * _MS, (0.25, 0.5, 0.75)))
    return BatchTime(batch, len(seconds), median, low, high)
