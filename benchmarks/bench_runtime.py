"""What the runtime costs beside the engine: `python -m benchmarks.bench_runtime` measures and checks it.

Imports beyond NumPy and the first verdict of a process are timed in fresh processes, the runtime on prepared arrays
against the bare engine in turns within one process. The command fails where a limit is not kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import jpeg_bytes, photograph
from benchmarks.tables import publish
from runtime import Detector, DetectorService
from runtime.backends import open_backend
from runtime.bundle import open_bundle
from train.provenance import environment

RESULTS = Path("benchmarks/results/runtime.json")
DOCUMENT = Path("docs/runtime.md")
BEGIN, END = "<!-- runtime: begin -->", "<!-- runtime: end -->"
BACKENDS = ("onnxruntime", "openvino")
BATCHES = (8, 64)
SIDE_PX = 256

IMPORT, FIRST, OVERHEAD, SERVICE = (
    "import beyond numpy",
    "first verdict",
    "Detector / engine",
    "DetectorService / engine",
)
# The service is not held to a limit: it waits for other pictures, and collects its batches anew.
LIMITS = {IMPORT: 100.0, FIRST: 1500.0, OVERHEAD: 1.10}

# Programs of fresh processes; each prints milliseconds, or ends when its verdict is there.
IMPORTS = {
    "runtime": "import runtime",
    "Detector": "from runtime import Detector",
    "DetectorService": "from runtime import DetectorService",
}
_TIMED_IMPORT = "import time, numpy; t = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - t))"
_FIRST_VERDICT = (
    "import sys; from runtime import Detector\n"
    "with Detector.load(sys.argv[1], backend=sys.argv[2]) as detector:\n"
    "    print(detector.predict([sys.argv[3]])[0].verdict)"
)


def row(what: str, case: str, values: Sequence[float]) -> dict[str, Any]:
    """Median and spread over rounds, and whether the limit is kept.

    Args:
        what: the limit's name; ratios have no unit, all others are milliseconds.
        case: which one of them.
        values: one a round.
    """
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    median, limit = statistics.median(values), LIMITS.get(what)
    return {
        "what": what,
        "case": case,
        "median": round(median, 4),
        "iqr": round(high - low, 4),
        "rounds": len(values),
        "limit": limit,
        "kept": limit is None or median <= limit,
    }


def output_of(*command: str) -> str:
    """What a Python program prints that finds its modules compiled, as an installation leaves them.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    compiled = Path(tempfile.gettempdir()) / "ntf-bench-runtime-bytecode"
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    settings["PYTHONPYCACHEPREFIX"] = str(compiled)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=settings)
    return done.stdout.strip()


def import_rows(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each import in fresh processes that have imported NumPy."""
    found: dict[str, list[float]] = {case: [] for case in IMPORTS}
    for _ in range(rounds + 1):
        for case, statement in IMPORTS.items():
            found[case].append(float(output_of("-c", _TIMED_IMPORT.format(statement))))
    # The first round compiles.
    return [row(IMPORT, case, values[1:]) for case, values in found.items()]


def first_verdict_rows(model: Path, picture: Path, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from the start of a process to the end of one that has printed its verdict."""
    found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds + 1):
        for backend in BACKENDS:
            began = time.perf_counter()
            verdict = output_of("-c", _FIRST_VERDICT, str(model), backend, str(picture))
            found[backend].append(1e3 * (time.perf_counter() - began))
            assert verdict in ("real", "uncertain", "fake")
    # The first round compiles, and reads libraries from the disk.
    return [row(FIRST, backend, values[1:]) for backend, values in found.items()]


def elapsed_s(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overhead_rows(model: Path, rounds: int) -> list[dict[str, Any]]:
    """Time of `Detector` and `DetectorService` on prepared arrays as a multiple of the bare engine's, in turns."""
    size = open_bundle(model).manifest.preprocess
    images = np.stack([photograph(size.height, size.width, seed=seed) for seed in range(max(BATCHES))])
    cases = [(backend, batch) for backend in BACKENDS for batch in BATCHES]
    return [found for backend, batch in cases for found in _overheads(model, backend, images[:batch], rounds)]


def _overheads(model: Path, backend: str, images: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    bundle, batch = open_bundle(model), len(images)
    artifact = bundle.manifest.onnx_artifact("fp32")
    assert artifact is not None
    engine = open_backend(backend, bundle.read(artifact), bundle.manifest, file=artifact.file)
    options = {"backend": backend, "precision": "fp32"}
    with (
        Detector.load(model, **options) as detector,
        DetectorService.load(model, max_batch_size=batch, **options) as service,
    ):
        expected = bundle.manifest.calibration["fp32"].fake_probability(engine.infer(images).logits)
        for scorer in (detector.predict(images, batch_size=batch), service.predict(images)):
            np.testing.assert_allclose([d.fake_probability for d in scorer], expected, atol=1e-4)
        ratios: dict[str, list[float]] = {OVERHEAD: [], SERVICE: []}
        for _ in range(rounds):
            bare = elapsed_s(lambda: engine.infer(images))
            ratios[OVERHEAD].append(elapsed_s(lambda: detector.predict(images, batch_size=batch)) / bare)
            ratios[SERVICE].append(elapsed_s(lambda: service.predict(images)) / bare)
    engine.close()
    return [row(what, f"{backend}, batch {batch}", values) for what, values in ratios.items()]


def measured(model: Path, *, rounds: int) -> list[dict[str, Any]]:
    """All rows.

    Args:
        model: bundle with an FP32 graph.
        rounds: repetitions; in each, everything takes its turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        picture.write_bytes(jpeg_bytes(photograph(SIDE_PX, SIDE_PX)))
        return [
            *import_rows(rounds),
            *first_verdict_rows(model, picture, rounds),
            *overhead_rows(model, rounds),
        ]


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file."""
    machine, versions = results["environment"]["machine"], results["environment"]["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        + ", ".join(f"{backend} {versions[backend]}" for backend in BACKENDS)
        + f"; {results['settings']['model']}, FP32. Medians ± half the interquartile range over "
        f"{results['settings']['rounds']} rounds.",
        "",
        "| what | case | median | limit |",
        "|---|---|---:|---:|",
    ]
    for found in results["rows"]:
        ratio = found["what"] in (OVERHEAD, SERVICE)
        digits, unit = (2, "") if ratio else (0, " ms")
        limit = "" if found["limit"] is None else f"{found['limit']:.{digits}f}{unit}"
        cell = f"{found['median']:.{digits}f} ± {found['iqr'] / 2:.{digits}f}{unit}"
        lines.append(f"| {found['what']} | {found['case']} | {cell} | {limit} |")
    return "\n".join(lines)


def timed_bundle(folder: Path) -> Path:
    """The bundle of `benchmarks.model`, trained for seconds and exported."""
    from benchmarks.model import quick_run
    from export.trt import Options, export_run

    export_run(Options(run=quick_run(folder), model=folder / "bundle", fp32=True, engine=False))
    return folder / "bundle"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results file and the table, and say which limits are broken; status 1 where one is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_runtime", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="bundle to time; default: one that is trained and exported first")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--document", type=Path, help=f"file with the table; default: {DOCUMENT} with the default --results"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("wanted 1 round or more")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or timed_bundle(Path(folder))
        settings = {"model": open_bundle(model).manifest.encoder, "rounds": options.rounds, "picture_px": SIDE_PX}
        results = {"environment": environment(), "settings": settings, "rows": measured(model, rounds=options.rounds)}
    document = options.document or (DOCUMENT if options.results == RESULTS else None)
    publish(results, markdown(results), path=options.results, document=document, markers=(BEGIN, END))
    print(f"wrote {options.results}" + (f" and the table in {document}" if document else ""))
    broken = [found for found in results["rows"] if not found["kept"]]
    for found in broken:
        print(
            f"{found['what']}, {found['case']}: {found['median']:g}, wanted at most {found['limit']:g}", file=sys.stderr
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
