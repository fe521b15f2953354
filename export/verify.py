"""Check a model bundle: `python -m export.verify --model M`. Exit status: 0 every gate holds, 1 one is broken, 2 usage.

Every precision runs on every back-end that runs here: against the PyTorch model that it came from on the same
pictures, on the bundle's golden inputs, and with pictures alone and in batches. On request graphs are compared layer
by layer, and everything is timed. Status 2 also says that there was nothing to compare: a damaged bundle, no run, no
back-end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from export.bundle_checks import verify_bundle
from export.latency import SECONDS
from export.layer_comparison import BOUNDS_DB
from export.report import REPORT_FOLDER, check_table, latency_table, parity_table
from export.run_inputs import run_of_checkpoint, validation_pictures
from export.verification import Verification
from export.verification_report import write_verification
from runtime.bundle import Bundle, newest_bundle, open_bundle
from runtime.errors import NTFError, UsageError
from train.checkpoint import load_config, make_folder
from train.integrity import data_source, split_of_run
from train.pictures import PictureSet
from train.provenance import environment

PASSED, BROKEN, USAGE = 0, 1, 2


@dataclass(frozen=True)
class Options:
    """Compare every precision and back-end of a model bundle with the PyTorch model it was exported from."""

    model: Path | None = None
    """Bundle folder or .zip; default: the newest in models/."""
    run: Path | None = None
    """Run it was exported from; default: found in --runs by the hash of its weights."""
    runs: Path = Path("runs")
    """Where to look for the run."""
    data: Path | None = None
    """Folder or CSV with labelled pictures; default: the run's validation pictures."""
    split: str = "val"
    """Split of the pictures."""
    out: Path | None = None
    """Folder for verify.json, verify.md and their pictures; default: report/verify in the run folder."""
    layers: tuple[Literal["fp16", "int8"], ...] = ()
    """Compare these graphs with FP32 tensor by tensor, and name the first layer that is off."""
    layer_bound: float | None = None
    """SQNR in dB that no tensor may fall below; default: 30 for fp16, 10 for int8."""
    latency: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time the graph alone, with copies and from encoded pictures on, for batches of 1 to 64."""
    latency_seconds: float = SECONDS
    """Seconds for each stage and batch size of a precision on a back-end; what does not fit is left out and listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m export.verify", args=arguments)
    console = Console(markup=False, soft_wrap=True)  # file names are not markup
    try:
        bundle = open_bundle(options.model or newest_bundle(Path("models")))
        require_usable(options, bundle)
        run = options.run or run_of_checkpoint(bundle.manifest.checkpoint_sha256, options.runs)
        pictures = chosen_pictures(options, run)
        out = options.out or run / REPORT_FOLDER
        make_folder(out, option="--out")  # said now, and not after all the measuring
        console.print(f"verifying {bundle.location} against {run} on {len(pictures)} pictures of {pictures.root}")
        result = verify_bundle(
            bundle,
            run,
            pictures,
            layers={
                name: BOUNDS_DB[name] if options.layer_bound is None else options.layer_bound for name in options.layers
            },
            latency_seconds=options.latency_seconds if options.latency else None,
        )
        about = {
            "model": bundle.manifest.name,
            "checkpoint_sha256": bundle.manifest.checkpoint_sha256,
            "data_sha256": pictures.content_sha256(),
            "environment": environment(),
        }
        written = write_verification(out, result, about)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    report(console, result, written)
    return PASSED if result.passed else BROKEN


def require_usable(options: Options, bundle: Bundle) -> None:
    """Refuse options that make no sense together or with this bundle, before anything takes time.

    Raises:
        UsageError: naming the option.
    """
    there = bundle.manifest.onnx_precisions()
    for name in options.layers:
        if name not in there or "fp32" not in there:
            raise UsageError(
                f"--layers {name}",
                got=f"a bundle with these ONNX graphs: {', '.join(there) or 'none'}",
                wanted=f"fp32 and {name}",
                remedy=f"export it: python -m export.trt --{name}",
            )
    if options.layer_bound is not None and not options.layers:
        raise UsageError(
            "--layer-bound", got="no --layers", wanted="a graph that it is for", remedy="add --layers fp16 int8"
        )
    if options.layer_bound is not None and not math.isfinite(options.layer_bound):
        raise UsageError(
            "--layer-bound",
            got=f"{options.layer_bound:g}",
            wanted="a number of dB",
            remedy="leave it out for the default",
        )
    if not 0 < options.latency_seconds < math.inf:
        raise UsageError(
            "--latency-seconds",
            got=f"{options.latency_seconds:g}",
            wanted="more than 0, and not without end",
            remedy="leave it out for the default",
        )


def chosen_pictures(options: Options, run: Path) -> PictureSet:
    """The labelled pictures that the options name.

    Raises:
        NTFError: they cannot be read.
    """
    config = load_config(run)
    if options.data is None and options.split == "val":
        return validation_pictures(config)
    source = options.data or data_source(config.data)
    return split_of_run(config, source, options.split, own=options.data is None)


def report(console: Console, result: Verification, written: Sequence[Path]) -> None:
    """Print what was found, each broken gate, and the files that were written."""
    console.print(parity_table(result.comparisons))
    console.print(check_table(result.golden, result.invariance))
    for comparison in result.layers:
        worst = min(comparison.layers, key=lambda layer: layer.sqnr_db)
        console.print(
            f"layers of {comparison.precision}: {len(comparison.layers)} tensors; the worst SQNR, "
            f"{worst.sqnr_db:.1f} dB, is that of {worst.compared} of node {worst.node}"
        )
    if result.latency is not None:
        console.print(latency_table(result.latency))
    for where, words in result.failures.items():
        console.print(f"{where} is outside its limits: {'; '.join(words)}", style="bold red")
    if not result.passed and not result.layers:
        console.print("--layers fp16 int8 compares the graphs tensor by tensor and names the first layer that is off")
    console.print(f"{'passed' if result.passed else 'FAILED'}; report: {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
