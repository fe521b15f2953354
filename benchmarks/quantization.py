"""INT8 of four kinds of network within the accuracy budget: `python -m benchmarks.quantization --data data/demo`.

A detector is trained on few pictures with each, exported to INT8 and built into a TensorRT-RTX engine. Only
EfficientNet-lite0 begins with trained weights; the others begin at random, so what is shown is that their graphs
export, quantise and build, and what that costs such a detector, not how well it detects. The figures go to
`benchmarks/results/quantization.json`; the table in docs/export.md is made from that file.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks.tables import with_tables
from export.budget import Budget
from export.int8_report import FOLDER, JSON_FILE
from export.run_export import export_run
from export.trt_options import Options as ExportOptions
from runtime.bundle import open_bundle
from runtime.errors import NTFError
from runtime.manifest import ArtifactSpec
from train import run
from train.checkpoint import save_json
from train.data import scan_pictures
from train.markdown import markdown_table
from train.provenance import environment

RESULTS = Path("benchmarks/results/quantization.json")
DOCUMENT = Path("docs/export.md")
BEGIN, END = "<!-- quantization: begin -->", "<!-- quantization: end -->"
ENCODERS = {
    "tf_efficientnet_lite0": "package",
    "resnet50": "none",
    "vit_tiny_patch16_224": "none",
    "legacy_xception": "none",
}
# The whole network learns, so that its logits are further from each other than INT8 moves them.
WHOLE_NETWORK = (
    *("--method", "bce", "--crop", "96", "--stage2.epochs", "8", "--stage2.batch-size", "16"),
    *("--stage2.optimizer", "adamw", "--stage2.lr", "0.0005"),
)
# These learn nothing from so few pictures; a linear classifier reads their random features.
RANDOM_FEATURES = ("vit_tiny_patch16_224", "legacy_xception")
LINEAR = (
    *("--method", "probe", "--standardize", "--cache-features", "--cached-views", "1", "--stage2.scl-crop", "224"),
    *("--stage2.optimizer", "adamw", "--stage2.lr", "0.001", "--stage2.epochs", "5", "--stage2.weight-decay", "0.1"),
)
# Rates that so few pictures resolve.
RATES = ("--real-flagged-rate", "0.05", "--fake-missed-rate", "0.05")
PACKAGES = ("onnxruntime", "openvino", "tensorrt-rtx")
COLUMNS = (
    "encoder",
    "AP in PyTorch",
    "calibrator",
    "layers returned",
    "operations in INT8",
    "AP loss",
    "flips",
    "FP32 / INT8 MB",
    "INT8 engine: layers",
)


@dataclass(frozen=True)
class Options:
    """Train, export and quantise a detector on each of four encoders."""

    data: Path
    """Pictures with a train and a val split."""
    out: Path = Path("build/quantization")
    """Folder of the runs and bundles."""
    encoders: tuple[str, ...] = tuple(ENCODERS)
    """Which of the four; figures of the others that were measured here earlier in the same way stay."""
    train: int = 96
    """Training pictures, evenly spaced over each class."""
    val: int = 60
    """Validation pictures, on which INT8 is calibrated and judged."""
    budget: Budget = field(default_factory=lambda: Budget(ap=1.0, accuracy=3.5, flips=3.5, ece=6.0))
    """What INT8 may cost, in points; of 60 pictures one is 1.7 points."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0, or 2 with a sentence."""
    options = tyro.cli(Options, prog="python -m benchmarks.quantization", args=arguments)
    try:
        listed = write_list(options)
        for name in options.encoders:
            # After each: the next may take long, or fail.
            save_results(options, measured(name, listed, options))
            write_table()
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {RESULTS} and the table in {DOCUMENT}")
    return 0


def save_results(options: Options, row: dict[str, Any]) -> None:
    """Put the figures of an encoder into the results file, beside those of others that were measured likewise."""
    here = environment()
    facts = {"pictures": options.val}
    earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    same = all(earlier.get(name) == value for name, value in facts.items()) and all(
        earlier.get("environment", {}).get(name) == here[name] for name in ("machine", "versions")
    )
    rows = {entry["encoder"]: entry for entry in earlier["encoders"]} if same else {}
    rows[row["encoder"]] = row
    known = [name for name in ENCODERS if name in rows]
    save_json(RESULTS, {"encoders": [rows[name] for name in known], **facts, "environment": here})


def write_list(options: Options) -> Path:
    """A CSV list of as many pictures of each split as are asked for, half of them of each class."""
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = scan_pictures(options.data)
    path = options.out / "pictures.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "generator", "family", "original_id", "split"))
        for split, count in (("train", options.train), ("val", options.val)):
            for label in (0, 1):
                records = [record for record in pictures.split(split).records if record.label == label]
                wanted = min(count // 2, len(records))
                for place in range(wanted):
                    r = records[place * len(records) // wanted]
                    rows.writerow((r.path.absolute(), r.label, r.generator, r.family, r.original_id, split))
    return path


def measured(encoder: str, listed: Path, options: Options) -> dict[str, Any]:
    """Figures of one encoder.

    Raises:
        NTFError: it cannot be trained, exported or quantised within the budget.
    """
    folder = options.out / encoder
    weights = ENCODERS.get(encoder, "none")
    learning = LINEAR if encoder in RANDOM_FEATURES else WHOLE_NETWORK
    recipe = ("--preset", "demo", *learning, "--encoder", encoder, "--encoder-weights", weights)
    status = run.main([*recipe, "--data", str(listed), "--out", str(folder), "--overwrite", *RATES])
    if status != 0:
        raise NTFError(encoder, got=f"status {status} of training", wanted="0", remedy="see the message above")
    budget = {f"budget_{name}": points for name, points in asdict(options.budget).items()}
    bundle = export_run(ExportOptions(run=folder, model=options.out / "models" / encoder, int8=True, **budget))
    manifest = open_bundle(bundle.location).manifest
    search = json.loads((folder / FOLDER / JSON_FILE).read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "encoder": encoder,
        "weights": weights,
        "budget": asdict(options.budget),
        "validation_ap": history[-1].get("val_ap"),
        "calibrators": search["calibrators"],
        "calibrator": search["calibrator"],
        "steps": search["steps"],
        "returned": search["returned"],
        "artifacts": [_facts(artifact) for artifact in manifest.artifacts],
    }


def write_table() -> None:
    """The table of docs/export.md, from the results file."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_tables(document, table(results), begin=BEGIN, end=END), encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """A row for each encoder, and where it was measured."""
    machine, versions = (results["environment"][name] for name in ("machine", "versions"))
    packages = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    measured_on = f"{machine['cpu']}, {results['pictures']} validation pictures of the demo, {packages}"
    about = (
        f"{measured_on}. Losses and flips in points, where they are largest; in brackets, what the budget allowed."
        " Made by `python -m benchmarks.quantization`."
    )
    return markdown_table(COLUMNS, [_row(entry) for entry in results["encoders"]]) + "\n\n" + about


def _row(entry: dict[str, Any]) -> list[str]:
    step = [step for step in entry["steps"] if not step["excess"]][-1]
    losses = [loss for cost in step["costs"] for loss in cost["ap"].values() if loss is not None]
    size = {(a["precision"], a["format"], a["remainder"]): a["size_bytes"] / 1e6 for a in entry["artifacts"]}
    engine = next((a for a in entry["artifacts"] if a["format"] == "engine" and a["precision"] == "int8"), None)
    return [
        f"{entry['encoder']}, {'ImageNet' if entry['weights'] == 'package' else 'random'}",
        f"{100 * entry['validation_ap']:.1f}",
        entry["calibrator"],
        str(step["returned"]),
        f"{100 * step['int8_share']:.0f} %",
        f"{max(losses):+.2f} ({entry['budget']['ap']:g})",
        f"{max(cost['flips'] for cost in step['costs']):.2f} ({entry['budget']['flips']:g})",
        f"{size['fp32', 'onnx', 'fp32']:.1f} / {size['int8', 'onnx', 'fp32']:.1f}",
        "not built" if engine is None else str(sum(engine["layers"].values())),
    ]


def _facts(artifact: ArtifactSpec) -> dict[str, Any]:
    plain = {name: getattr(artifact, name) for name in ("precision", "format", "remainder", "size_bytes", "targets")}
    engine = {} if artifact.engine is None else {"layers": artifact.engine.layers}
    return plain | engine | {"parity": [asdict(parity) for parity in artifact.parity]}


if __name__ == "__main__":
    sys.exit(main())
