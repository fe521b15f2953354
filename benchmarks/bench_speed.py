"""JPEG files to verdicts, the runtime against PyTorch in one run: `python -m benchmarks.bench_speed` writes both.

In each round every contender scores the same files in turn, so that a slow second of the machine falls on all of them;
what counts is the median over rounds of the ratio within a round. Verdicts are compared before anything is timed. The
command fails where a ratio is below what is promised.

PyTorch's threads must sleep while they wait (OMP_WAIT_POLICY=passive): where other programs run beside the benchmark,
threads that spin keep one another from the processor, and PyTorch alone would look several times slower than it is.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.model import quick_run
from benchmarks.pictures import jpeg_bytes, photograph, write_pictures
from benchmarks.tables import publish
from benchmarks.torch_scoring import REFERENCE, torch_logits
from export.trt import Options, export_run
from runtime import Detector
from runtime.bundle import open_bundle
from runtime.jpeg_region import why_in_full
from runtime.manifest import MANIFEST_FILE
from runtime.turbojpeg import find_turbojpeg
from train.checkpoint import load_detector
from train.provenance import environment

RESULTS = Path("benchmarks/results/speed.json")
DOCUMENT = Path("docs/speed.md")
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"

LARGE, STREAM = "one 12 MP JPEG, batch 1", "256 px JPEGs in a stream, batches of 32"
BACKENDS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")
IN_FULL = "onnxruntime fp32, decoded in full"
HEIGHT_PX, WIDTH_PX, SIDE_PX = 3000, 4000, 256
BATCH_SIZE = 32
# In units of the logit. INT8 moves those of this model by about 0.2 (parity figures in its manifest).
CLEAR = 0.5

Verdicts = list[str]
Contender = Callable[[Sequence[bytes]], Verdicts]


class Timing(NamedTuple):
    """Seconds that one call took: on the clock, and of all processors together."""

    clock: float
    processors: float


class SpeedBenchmarkError(RuntimeError):
    """Contenders cannot be compared: they do not decide alike, or something they need is not here."""


@dataclass(frozen=True)
class Promise:
    """At least so many times faster than the reference."""

    workload: str
    contender: str
    at_least: float


PROMISES = (
    Promise(LARGE, "onnxruntime fp32", 4.0),
    Promise(LARGE, "openvino int8", 4.0),
    Promise(STREAM, "onnxruntime fp32", 1.5),
    Promise(STREAM, "openvino fp32", 1.5),
    Promise(STREAM, "openvino int8", 3.0),
)


def workloads(folder: Path, pictures: int, model: TorchModel) -> dict[str, list[bytes]]:
    """JPEG files of both kinds the model was trained on, as many called real as fake.

    Pictures whose logit is near a threshold are left out: how often INT8 decides otherwise on these is what
    `export.verify` measures, and here everybody has to do the same work.

    Args:
        folder: to make pictures in.
        pictures: how many the stream has, an even number.
        model: says which pictures are clear.

    Raises:
        SpeedBenchmarkError: too few pictures are clear.
    """
    made = write_pictures(folder, counts={"test": pictures}, side=SIDE_PX, seed=1)
    stream: list[bytes] = []
    for kind in ("0_real", "1_fake"):
        small = [np.asarray(Image.open(path)) for path in sorted(made.glob(f"test/*/{kind}/*.png"))]
        clear = [data for data in map(jpeg_bytes, small) if model.is_clear(data)][: pictures // 2]
        if len(clear) < pictures // 2:
            raise SpeedBenchmarkError(f"{len(clear)} pictures of {kind} are clear, wanted {pictures // 2}")
        stream += clear
    large = _in_the_middle(np.asarray(Image.open(io.BytesIO(stream[-1]))))
    return {LARGE: [jpeg_bytes(large)], STREAM: stream}


def _in_the_middle(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    large = photograph(HEIGHT_PX, WIDTH_PX)
    top, left = (HEIGHT_PX - rgb.shape[0]) // 2, (WIDTH_PX - rgb.shape[1]) // 2
    large[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
    return large


class TorchModel:
    """The reference: the trained model in PyTorch, with the thresholds of its bundle."""

    def __init__(self, run: Path, bundle: Path) -> None:
        manifest = open_bundle(bundle).manifest
        self._detector, self._calibration = load_detector(run), manifest.calibration["fp32"]
        self._size = manifest.preprocess.height

    def verdicts(self, files: Sequence[bytes]) -> Verdicts:
        """Verdicts in the order of the files."""
        batches = [files[first : first + BATCH_SIZE] for first in range(0, len(files), BATCH_SIZE)]
        logits = np.concatenate([torch_logits(self._detector, batch, size=self._size) for batch in batches])
        return [str(verdict) for verdict in self._calibration.verdicts(logits)]

    def is_clear(self, data: bytes) -> bool:
        """Whether the logit of a JPEG file is further than CLEAR from both thresholds."""
        logit = float(torch_logits(self._detector, [data], size=self._size)[0])
        thresholds = (self._calibration.real_threshold, self._calibration.fake_threshold)
        return min(abs(logit - threshold) for threshold in thresholds) > CLEAR


def contenders(model: TorchModel, bundle: Path, opened: ExitStack) -> dict[str, Contender]:
    """Everything that takes part, by name; the reference first.

    Raises:
        SpeedBenchmarkError: JPEG files are decoded in full here, so that there is nothing to compare.
    """
    if why_in_full():
        raise SpeedBenchmarkError(f"JPEG files are decoded in full: {why_in_full()}; pip install .[jpeg]")
    detectors = {
        f"{backend} {precision}": opened.enter_context(Detector.load(bundle, backend=backend, precision=precision))
        for backend in BACKENDS
        for precision in PRECISIONS
    }
    found: dict[str, Contender] = {REFERENCE: model.verdicts}
    found |= {name: partial(_verdicts, detector) for name, detector in detectors.items()}
    return found | {IN_FULL: partial(_verdicts_in_full, detectors["onnxruntime fp32"])}


def _verdicts(detector: Detector, files: Sequence[bytes]) -> Verdicts:
    found = detector.stream(files, batch_size=BATCH_SIZE)
    return [detection.error or str(detection.verdict) for detection in found]


def _verdicts_in_full(detector: Detector, files: Sequence[bytes]) -> Verdicts:
    with mock.patch("runtime.decode.why_in_full", return_value="as it is without the library"):
        return _verdicts(detector, files)


def require_same_verdicts(found: Mapping[str, Verdicts]) -> None:
    """Refuse to time contenders that decide differently, or a workload with one verdict alone that proves nothing.

    Raises:
        SpeedBenchmarkError: a verdict differs from the reference's.
    """
    expected = found[REFERENCE]
    if len(expected) > 1 and not {"real", "fake"} <= set(expected):
        raise SpeedBenchmarkError(f"{REFERENCE} calls every picture {expected[0]}")
    for name, verdicts in found.items():
        different = sum(a != b for a, b in zip(expected, verdicts, strict=True))
        if different:
            raise SpeedBenchmarkError(f"{name}: {different} of {len(expected)} verdicts are not those of {REFERENCE}")


def raced(taking_part: Mapping[str, Contender], files: Sequence[bytes], rounds: int) -> dict[str, list[Timing]]:
    """Timings of each contender in each round; who begins changes from round to round."""
    names = list(taking_part)
    found: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            clock, processors = time.perf_counter(), time.process_time()
            taking_part[name](files)
            found[name].append(Timing(time.perf_counter() - clock, time.process_time() - processors))
    return found


def rows(workload: str, timings: Mapping[str, Sequence[Timing]], pictures: int) -> list[dict[str, Any]]:
    """For each contender, time for one picture and its ratios to the reference within the rounds."""
    found = []
    for name, mine in timings.items():
        low, middle, high = statistics.quantiles([timing.clock for timing in mine], n=4)
        pairs = list(zip(timings[REFERENCE], mine, strict=True))
        found.append(
            {
                "workload": workload,
                "contender": name,
                "median_ms": round(middle * 1e3 / pictures, 3),
                "iqr_ms": round((high - low) * 1e3 / pictures, 3),
                "times_faster": round(statistics.median(base.clock / own.clock for base, own in pairs), 2),
                "times_less_processor": round(
                    statistics.median(base.processors / own.processors for base, own in pairs), 2
                ),
                "rounds": len(mine),
            }
        )
    return found


def checks(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each promise with what was measured and whether it is met."""
    measured = {(row["workload"], row["contender"]): row["times_faster"] for row in found}
    return [
        {
            "workload": promise.workload,
            "contender": promise.contender,
            "at_least": promise.at_least,
            "measured": measured[promise.workload, promise.contender],
            "met": measured[promise.workload, promise.contender] >= promise.at_least,
        }
        for promise in PROMISES
    ]


def measured(folder: Path, *, rounds: Mapping[str, int], pictures: int) -> list[dict[str, Any]]:
    """All rows.

    Args:
        folder: to make run, bundle and pictures in; a run and a bundle that are there are used again.
        rounds: of each workload, two or more.
        pictures: of the stream, an even number.

    Raises:
        SpeedBenchmarkError: the contenders cannot be compared.
    """
    run, bundle = folder / "run", folder / "bundle"
    if not (bundle / MANIFEST_FILE).exists():
        export_run(Options(run=quick_run(folder), model=bundle, engine=False))
    model = TorchModel(run, bundle)
    found = []
    with ExitStack() as opened, tempfile.TemporaryDirectory() as made:
        taking_part = contenders(model, bundle, opened)
        for workload, files in workloads(Path(made), pictures, model).items():
            require_same_verdicts({name: score(files) for name, score in taking_part.items()})
            found += rows(workload, raced(taking_part, files, rounds[workload]), len(files))
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of a results file."""
    machine, versions = results["environment"]["machine"], results["environment"]["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "pillow", "onnxruntime", "openvino"))
    settings = results["settings"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {settings['torch_threads']} PyTorch threads, Python "
        f"{machine['python']}, {shown}; JPEG regions with {settings['jpeg_library']}. Time for one picture, median "
        "± half the interquartile range; ratios are medians over rounds of the ratio within a round, on the clock and "
        f"in processor time. The load average when it began was {settings['load_average_before']:.1f}: read the ratios."
    ]
    for workload in dict.fromkeys(row["workload"] for row in results["rows"]):
        lines += ["", f"| {workload} | time | times faster | times less processor time |", "|---|---:|---:|---:|"]
        lines += [
            f"| {r['contender']} | {r['median_ms']:.1f} ± {r['iqr_ms'] / 2:.1f} ms | {r['times_faster']:.2f} | "
            f"{r['times_less_processor']:.2f} |"
            for r in results["rows"]
            if r["workload"] == workload
        ]
    lines += ["", "| promise | times faster, at least | measured | |", "|---|---:|---:|---|"]
    lines += [
        f"| {c['workload']}: {c['contender']} | {c['at_least']:g} | {c['measured']:.2f} | "
        f"{'met' if c['met'] else 'NOT MET'} |"
        for c in results["checks"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results file and the tables of docs/speed.md; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="of the stream; the large picture has three times as many"
    )
    parser.add_argument("--pictures", type=int, default=64, help="of the stream")
    parser.add_argument("--folder", type=Path, help="keep run and bundle here, and use them again; default: a new one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--document", type=Path, help=f"file with the tables; default: {DOCUMENT} with the default --results"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.pictures < 4 or options.pictures % 2:
        parser.error("wanted 2 --rounds or more, and an even number of 4 --pictures or more")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        parser.error("wanted OMP_WAIT_POLICY=passive in the environment: set it before the command")
    rounds = {LARGE: 3 * options.rounds, STREAM: options.rounds}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options.folder or Path(folder), rounds=rounds, pictures=options.pictures)
    settings = {
        "picture_px": [WIDTH_PX, HEIGHT_PX],
        "stream_picture_px": [SIDE_PX, SIDE_PX],
        "stream_pictures": options.pictures,
        "batch_size": BATCH_SIZE,
        "rounds": rounds,
        "load_average_before": load,
        "torch_threads": torch.get_num_threads(),
        "jpeg_library": Path(find_turbojpeg().path or "").name.split(".")[0],
    }
    results = {"environment": environment(), "settings": settings, "rows": found, "checks": checks(found)}
    document = options.document or (DOCUMENT if options.results == RESULTS else None)
    publish(results, markdown(results), path=options.results, document=document, markers=(BEGIN, END))
    return 0 if all(check["met"] for check in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
