"""`ntf score`: its options, and the order in which things happen."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import runtime
from runtime.errors import UsageError
from runtime.scoring.progress import Progress

if TYPE_CHECKING:
    from runtime.manifest import ModelManifest
    from runtime.scoring.listing import ListingSpec
    from runtime.scoring.work import Configuration, Work

# A part that a kill takes is scored again: some seconds on a GPU, a minute on two CPU cores.
_PART_SIZE = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command, and what runs it."""
    parser.description = (
        "Scores a collection into one file with a row for each picture. The same command goes on where a stopped one"
        " was. Exit status: 0 all scored, 1 some failed (their rows say why), 2 usage, bad bundle or bad collection."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, list (.txt), table (.csv, .parquet) or .tar shard")
    parser.add_argument("--out", metavar="FILE", required=True, help="results: .csv, .jsonl or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace a results file that is there")
    parser.add_argument("--column", default="path", metavar="NAME", help="column with the paths in a table (path)")
    parser.add_argument("--model", metavar="MODEL", help="bundle folder or .zip; default: newest in ./models")
    parser.add_argument("--backend", default="auto", help="as for predict")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or int8")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (32)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of one inference")
    parser.add_argument(
        "--part-size", type=int, default=_PART_SIZE, metavar="N", help=f"pictures kept at once ({_PART_SIZE})"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a running Ray cluster; default: one on this machine")
    parser.add_argument("--workers", type=int, metavar="N", help="Ray: detectors (as many as there is room for)")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="Ray: GPUs of each detector (0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status of the command."""
    from runtime.bundle import newest_bundle
    from runtime.scoring.results import require_results_path
    from runtime.scoring.sources import pictures_of
    from runtime.scoring.work import Work, is_begun

    out = Path(options.out)
    _require_options(options)
    require_results_path(out, overwrite=options.overwrite or is_begun(out))
    model = Path(options.model) if options.model else newest_bundle(Path("models"))
    with Work(out) as work:
        listing = work.list_pictures(pictures_of(options.source, column=options.column))
        _require_some(options.source, listing)
        try:
            if options.engine == "ray":
                _score_on_ray(options, model, work, listing)
            else:
                _score_here(options, model, work, listing)
        except KeyboardInterrupt:
            print("\nntf: what is done is kept, and the same command goes on from here", file=sys.stderr)
            raise
        failed = work.finish()
    print(f"{listing.pictures - failed} scored, {failed} failed", file=sys.stderr)
    return int(failed > 0)


def _score_here(options: argparse.Namespace, model: Path, work: Work, listing: ListingSpec) -> None:
    from runtime.detector import Detector
    from runtime.scoring.local import score_locally
    from runtime.scoring.sources import base_folder

    with Detector.load(
        model,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        max_batch=options.batch_size,
    ) as detector:
        info = detector.info
        work.begin(_configuration(options, listing, detector.manifest, info.backend, info.precision))
        with _progress(work) as progress:
            base = base_folder(options.source)
            score_locally(work, detector, base, batch_size=options.batch_size, advance=progress.advance)


def _score_on_ray(options: argparse.Namespace, model: Path, work: Work, listing: ListingSpec) -> None:
    from runtime.bundle import open_bundle
    from runtime.scoring.on_ray import DetectorOptions, RayOptions, ray_cluster, resolve_on_worker, score_on_ray
    from runtime.scoring.sources import base_folder

    manifest = open_bundle(model).manifest
    spread = RayOptions(options.ray_address, options.workers, options.gpus, options.threads or 1)
    with ray_cluster(spread) as ray:
        backend, precision = resolve_on_worker(
            ray,
            manifest,
            spread,
            backend=options.backend,
            precision=options.precision,
            max_batch=options.batch_size,
        )
        work.begin(_configuration(options, listing, manifest, backend, precision))
        # Where no number was asked for, as many as Ray counts for a detector, if the back-end computes on the CPU.
        threads = options.threads or (None if backend == "trt" else spread.threads)
        opened = DetectorOptions(backend, precision, base_folder(options.source), options.batch_size, threads)
        with _progress(work) as progress:
            score_on_ray(ray, work, model, spread, opened, advance=progress.advance)


def _configuration(
    options: argparse.Namespace, listing: ListingSpec, manifest: ModelManifest, backend: str, precision: str
) -> Configuration:
    from runtime.manifest import manifest_to_json
    from runtime.scoring.work import Configuration

    return Configuration(
        source=os.path.abspath(options.source),
        pictures=listing.pictures,
        listing_sha256=listing.sha256,
        part_size=options.part_size,
        model=manifest.name,
        model_sha256=hashlib.sha256(manifest_to_json(manifest).encode()).hexdigest(),
        backend=backend,
        precision=precision,
        tool_version=runtime.__version__,
    )


@contextmanager
def _progress(work: Work) -> Iterator[Progress]:
    """Progress of what is missing, after a line that says what scores."""
    begun = work.configuration
    left = sum(map(work.part_length, work.missing()))
    print(f"model {begun.model}: {begun.precision} on {begun.backend}, {begun.pictures:,} pictures", file=sys.stderr)
    progress = Progress(begun.pictures, begun.pictures - left, sys.stderr)
    try:
        yield progress
    finally:
        progress.close()


def _require_options(options: argparse.Namespace) -> None:
    for name in ("batch_size", "part_size", "threads", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            _refuse(f"--{name.replace('_', '-')}", str(value), "a whole number of at least 1")
    if not options.gpus >= 0:
        _refuse("--gpus", str(options.gpus), "0 or more")
    for_ray = {"--ray-address": options.ray_address, "--workers": options.workers, "--gpus": options.gpus or None}
    given = [name for name, value in for_ray.items() if value is not None]
    if given and options.engine != "ray":
        _refuse(given[0], "an option of the Ray engine with --engine local", "--engine ray beside it")


def _require_some(source: str, listing: ListingSpec) -> None:
    from runtime.decode import PICTURE_SUFFIXES

    if not listing.pictures:
        wanted = f"pictures ({', '.join(PICTURE_SUFFIXES)})"
        raise UsageError(source, got="a collection without pictures", wanted=wanted, remedy="check the path")


def _refuse(option: str, got: str, wanted: str) -> NoReturn:
    raise UsageError(option, got=got, wanted=wanted, remedy="change this option, or leave it out")
