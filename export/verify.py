"""Check a model bundle: `python -m export.verify --model M`. Exit status 1 when any precision is outside its limits.

Every precision runs on every back-end that runs here, on the same pictures as the PyTorch model it came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from export.calibration import PreparedPictures
from export.errors import ExportError
from export.parity import (
    LIMITS,
    broken_limits,
    centred_thresholds,
    collect_logits,
    compare_logits,
    opened_backends,
    running_backends,
)
from export.report import REPORT_FOLDER, parity_json, parity_markdown, parity_table, write_report
from export.run_inputs import require_checkpoint, run_of_checkpoint, validation_pictures
from runtime.bundle import Bundle, newest_bundle, open_bundle
from runtime.errors import NTFError
from runtime.manifest import PRECISIONS, ParitySpec
from train.checkpoint import load_calibration, load_config, load_detector
from train.integrity import data_source, split_of_run
from train.pictures import PictureSet
from train.provenance import environment

BATCH_SIZE = 16


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
    """Folder for verify.json and verify.md; default: report/verify in the run folder."""


@dataclass(frozen=True)
class Verification:
    """Figures of every precision and back-end, and the limits they break.

    Attributes:
        rows: precision and figures.
        broken: limits that are broken, in words, by "<precision> on <back-end>".
    """

    rows: tuple[tuple[str, ParitySpec], ...]
    broken: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not any(self.broken.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m export.verify", args=arguments)
    console = Console(markup=False, soft_wrap=True)  # file names are not markup
    try:
        bundle = open_bundle(options.model or newest_bundle(Path("models")))
        run = options.run or run_of_checkpoint(bundle.manifest.checkpoint_sha256, options.runs)
        config = load_config(run)
        if options.data is None and options.split == "val":
            pictures = validation_pictures(config)
        else:
            source = options.data or data_source(config.data)
            pictures = split_of_run(config, source, options.split, own=options.data is None)
        console.print(f"verifying {bundle.location} against {run} on {len(pictures)} pictures of {pictures.root}")
        result = verify_bundle(bundle, run, pictures)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(parity_table(result.rows))
    about = {
        "model": bundle.manifest.name,
        "checkpoint_sha256": bundle.manifest.checkpoint_sha256,
        "data_sha256": pictures.content_sha256(),
        "environment": environment(),
    }
    written = write_report(
        options.out or run / REPORT_FOLDER,
        as_json=parity_json(result.rows, broken=result.broken, about=about),
        as_markdown=parity_markdown(result.rows, broken=result.broken, about=about),
    )
    for where, what in result.broken.items():
        if what:
            console.print(f"{where} is outside its limits: {'; '.join(what)}", style="bold red")
    console.print(f"{'passed' if result.passed else 'FAILED'}; report: {', '.join(map(str, written))}")
    return 0 if result.passed else 1


def verify_bundle(bundle: Bundle, run: Path, pictures: PictureSet) -> Verification:
    """Every ONNX graph of a bundle on every back-end that runs here, against PyTorch on the same pictures.

    Args:
        bundle: opened, so its files are what the manifest says.
        run: the run folder it was exported from.
        pictures: labelled pictures.

    Raises:
        ExportError: the run has other weights than the bundle, no back-end runs here, or a picture is bad.
    """
    require_checkpoint(run, bundle.manifest.checkpoint_sha256, model=bundle.location)
    names = running_backends()
    if not names:
        raise ExportError(
            "verification",
            got="no back-end that runs here",
            wanted="onnxruntime or openvino",
            remedy='pip install "ntf-toolkit[cpu]"',
        )
    artifacts = [bundle.manifest.onnx_artifact(precision) for precision in PRECISIONS]
    graphs = {artifact.precision: bundle.read(artifact) for artifact in artifacts if artifact is not None}
    images = PreparedPictures(pictures, bundle.manifest.preprocess, pictures.content_sha256())
    batches = track(images.batches(BATCH_SIZE), "scoring", total=-(-len(images) // BATCH_SIZE))
    with opened_backends(graphs, bundle.manifest, names) as backends:
        reference, scored = collect_logits(load_detector(run), backends, batches)
    labels = np.array([record.label for record in pictures.records])
    torch_calibration = load_calibration(run)
    rows, broken = [], {}
    for (precision, name), logits in scored.items():
        limits = LIMITS[precision]
        parity = compare_logits(
            logits,
            reference,
            labels,
            calibration=bundle.manifest.calibration[precision],
            reference_calibration=centred_thresholds(torch_calibration, reference),
            backend=name,
            limits=limits,
        )
        rows.append((precision, parity))
        broken[f"{precision} on {name}"] = broken_limits(
            parity, limits, calibration=torch_calibration, logit_std=float(np.std(reference))
        )
    return Verification(tuple(rows), broken)


if __name__ == "__main__":
    sys.exit(main())
