"""A collection scored on Ray Data: detectors on every node, rows kept by this process.

A task is one part of the listing and gives its rows, so a task that Ray repeats gives them again and nothing twice.
Nodes need the toolkit and the pictures at the same absolute paths; the model is sent to them.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime.errors
from runtime.bundle import pack_bundle
from runtime.detector import Detector
from runtime.errors import NTFError, UsageError
from runtime.manifest import ModelManifest
from runtime.scoring.listing import picture_from_line
from runtime.scoring.rows import row_from_line, row_to_line, rows_of
from runtime.scoring.work import Work


@dataclass(frozen=True)
class RayOptions:
    """How detectors are spread over a cluster.

    Args:
        address: of a running cluster; None starts one on this machine for as long as it is needed.
        workers: detectors at work; None for as many as there are free CPUs, or GPUs where `gpus` is not 0.
        gpus: of each detector.
        threads: CPU threads of one inference, and the CPUs that Ray keeps for a detector.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float = 0
    threads: int = 1


@dataclass(frozen=True)
class DetectorOptions:
    """What every detector is opened with.

    Args:
        backend: resolved, never "auto".
        precision: resolved, never "auto".
        base: absolute folder that relative paths start from.
        batch_size: pictures scored at once.
        threads: CPU threads of one inference.
    """

    backend: str
    precision: str
    base: str
    batch_size: int
    threads: int | None


@contextmanager
def ray_cluster(options: RayOptions) -> Iterator[Any]:
    """The module `ray`, connected; disconnected at the end, unless the program was connected before.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    # "local" even where RAY_ADDRESS is set: only what was asked for is used.
    local = {"include_dashboard": False} if options.address is None else {}
    try:
        ray.init(options.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"--ray-address {options.address}" if options.address else "--engine ray",
            got=f"no cluster ({error})",
            wanted="a running Ray cluster of this version",
            remedy="check the address with `ray status`, or leave it out to use this machine alone",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def resolve_on_worker(
    ray: Any, manifest: ModelManifest, options: RayOptions, *, backend: str, precision: str, max_batch: int
) -> tuple[str, str]:
    """Back-end and precision that a worker would take, which may have a GPU that this machine has not.

    Args:
        ray: connected.
        manifest: of the bundle.
        options: how detectors are spread.
        backend: as for `Detector.load`, and so are the next two.
        precision: as there.
        max_batch: as there.

    Raises:
        BackendError: nothing fits there.
    """
    resources = {"num_cpus": options.threads, "num_gpus": options.gpus}
    text = ray.get(ray.remote(_resolved).options(**resources).remote(manifest, backend, precision, max_batch))
    answer = json.loads(text)
    _raise_error(answer["error"])
    return answer["backend"], answer["precision"]


def score_on_ray(
    ray: Any,
    work: Work,
    model: Path,
    options: RayOptions,
    detector: DetectorOptions,
    *,
    advance: Callable[[int, int], None],
) -> None:
    """Rows of every part that is missing, kept as they come.

    Args:
        ray: connected.
        work: begun.
        model: bundle, as a folder or .zip on this machine.
        options: how detectors are spread.
        detector: what they are opened with.
        advance: told of rows and of failed ones among them as parts come.

    Raises:
        NTFError: as a detector raised it on its node.
    """
    data = importlib.import_module("ray.data")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    pyarrow = importlib.import_module("pyarrow")
    # In Ray's object store, which goes to the disk when memory is full, and not in this process.
    parts = [
        ray.put(pyarrow.table({"part": [number], "lines": ["\n".join(lines)]}))
        for number, lines in work.listed(work.missing())
    ]
    if not parts:
        return
    scored = data.from_arrow_refs(parts).map_batches(
        PartScorer,
        # Within a list, Ray hands the reference on and does not tie the life of a detector to it.
        fn_constructor_args=([ray.put(_packed(model))], detector),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(len(parts), options.workers or _free_workers(ray, options))),
        num_cpus=options.threads,
        num_gpus=options.gpus,
    )
    for answer in scored.iter_rows():
        _raise_error(answer["error"])
        rows = [row_from_line(line) for line in answer["rows"].splitlines()]
        work.commit(int(answer["part"]), rows)
        advance(len(rows), sum(row.error is not None for row in rows))


class PartScorer:
    """Detector on a node, called by Ray Data with one part at a time.

    Args:
        model: list with the reference of the bundle's .zip in Ray's object store.
        options: what the detector is opened with.

    Note:
        An error of ours goes back as an answer: how Ray wraps exceptions changes with its version.
    """

    def __init__(self, model: list[Any], options: DetectorOptions) -> None:
        self._options = options
        self._error: NTFError | None = None
        try:
            self._detector = _opened(_import_ray().get(model[0]), options)
        except NTFError as error:
            self._error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Numbers, rows and errors of parts: {"part", "rows", "error"}, one entry each."""
        answers = [self._rows(str(lines)) for lines in batch["lines"]]
        return {
            "part": [int(number) for number in batch["part"]],
            "rows": [rows for rows, _ in answers],
            "error": [error for _, error in answers],
        }

    def _rows(self, lines: str) -> tuple[str, str]:
        if self._error is not None:
            return "", _error_text(self._error)
        pictures = [picture_from_line(line) for line in lines.splitlines()]
        try:
            rows = rows_of(self._detector, pictures, self._options.base, batch_size=self._options.batch_size)
            return "\n".join(map(row_to_line, rows)), ""
        except NTFError as error:
            return "", _error_text(error)


def _opened(packed: bytes, options: DetectorOptions) -> Detector:
    with tempfile.TemporaryDirectory(prefix="ntf-score-") as folder:
        path = Path(folder) / "model.zip"
        path.write_bytes(packed)
        return Detector.load(
            path,
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            max_batch=options.batch_size,
        )


def _resolved(manifest: ModelManifest, backend: str, precision: str, max_batch: int) -> str:
    from runtime.backends.choice import choose

    try:
        choice = choose(manifest, backend=backend, precision=precision, max_batch=max_batch)
    except NTFError as error:
        return json.dumps({"error": _error_text(error)})
    return json.dumps({"error": "", "backend": choice.backend, "precision": choice.artifact.precision})


def _packed(model: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="ntf-score-") as folder:
        return pack_bundle(model, Path(folder) / "model.zip").location.read_bytes()


def _free_workers(ray: Any, options: RayOptions) -> int:
    """Detectors that the cluster has room for, at least one: Ray waits where there is no room yet."""
    free = ray.available_resources()
    if options.gpus > 0:
        return max(1, int(free.get("GPU", 0) / options.gpus))
    return max(1, int(free.get("CPU", 1) / options.threads))


def _error_text(error: NTFError) -> str:
    # Of a class that lives elsewhere, such as an error of CUDA, the one of `runtime.errors` that it derives from.
    kind = next(kind for kind in type(error).__mro__ if hasattr(runtime.errors, kind.__name__))
    return json.dumps([kind.__name__, error.subject, error.got, error.wanted, error.remedy])


def _raise_error(text: str) -> None:
    """Raises the error that `_error_text` wrote down; nothing for an empty text."""
    if text:
        kind, subject, got, wanted, remedy = json.loads(text)
        raise getattr(runtime.errors, kind)(subject, got=got, wanted=wanted, remedy=remedy)


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "ray"
        raise UsageError(
            "--engine ray",
            got="no package ray" if missing else f"a ray that does not import ({error})",
            wanted="a working installation",
            remedy='pip install "ntf-toolkit[ray]", or leave the option out',
        ) from error
