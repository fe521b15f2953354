"""Options of `python -m export.trt` and how they are read; needs no package but numpy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.engine import EngineSettings
from runtime.manifest import Precision


@dataclass(frozen=True)
class Options:
    """What `python -m export.trt` is asked for; see its --help for what each one means."""

    int8: bool = False
    fp16: bool = False
    fp32: bool = False
    run: Path | None = None
    model: Path | None = None
    data: Path | None = None
    engine: bool = True
    calibration_pictures: int | None = None
    calibrator: str = "auto"
    budget_ap: float = 0.5
    budget_accuracy: float = 1.0
    budget_flips: float = 0.5
    budget_ece: float = 2.0
    int8_share: float = 0.5
    qdq_onnx: Path | None = None
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    target: str | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line; a wrong one ends the program with status 2 and a message.

    Args:
        arguments: without the program's name; None takes them from the command line.
    """
    # What is not given keeps the default that `Options` states.
    parser = argparse.ArgumentParser(
        prog="python -m export.trt",
        description="Export a run to ONNX and TensorRT, or build engines from the ONNX graphs of a bundle.",
        epilog="With --run, without --model, or where --model is no bundle yet, a run is exported. Otherwise engines"
        " are built into the bundle, which needs numpy and TensorRT alone.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_choice(parser)
    _add_export(parser.add_argument_group("exporting a run"))
    _add_int8(parser.add_argument_group("INT8 of a run, budgets in percentage points against PyTorch on its val split"))
    _add_engine(parser.add_argument_group("engines"))
    return Options(**vars(parser.parse_args(arguments)))


def asked_precisions(options: Options) -> list[Precision]:
    """The precisions that were asked for, widest first; all of them when none was."""
    asked: dict[Precision, bool] = {"fp32": options.fp32, "fp16": options.fp16, "int8": options.int8}
    return [name for name, wanted in asked.items() if wanted or not any(asked.values())]


def engine_settings(options: Options) -> EngineSettings:
    """How engines are built."""
    return EngineSettings(
        target=options.target,
        workspace_mib=options.workspace_mib,
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        tf32=options.tf32,
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--int8", action="store_true", help="INT8 with Q/DQ nodes; no precision asked means all")
    parser.add_argument("--fp16", action="store_true", help="FP16; the L2 norms and what follows them stay FP32")
    parser.add_argument("--fp32", action="store_true", help="FP32; an export writes its graph in any case")
    parser.add_argument("--model", type=Path, metavar="DIR", help="bundle folder; default: models/<name of the run>")


def _add_export(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--run", type=Path, metavar="DIR", help="run folder; default: the newest in runs/")
    group.add_argument(
        "--data", type=Path, metavar="PATH", help="folder or CSV whose val split is used instead of the run's own"
    )
    group.add_argument(
        "--engine",
        action=argparse.BooleanOptionalAction,
        help="build TensorRT engines (default); --no-engine stops after the ONNX graphs",
    )


def _add_int8(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration-pictures", type=int, metavar="N", help="largest number of pictures that ranges are measured on"
    )
    group.add_argument(
        "--calibrator",
        choices=("auto", "mse", "entropy", "percentile", "minmax"),
        help="how ranges are clipped; auto takes what changes the logits least (auto)",
    )
    budgets = (
        ("ap", "loss of average precision, of the generator that loses most"),
        ("accuracy", "loss of accuracy at the threshold"),
        ("flips", "verdicts that differ; one picture is always allowed"),
        ("ece", "rise of the expected calibration error"),
    )
    for name, what in budgets:
        default = getattr(Options, f"budget_{name}")
        group.add_argument(f"--budget-{name}", type=float, metavar="POINTS", help=f"{what} ({default})")
    group.add_argument(
        "--int8-share",
        type=float,
        metavar="SHARE",
        help="of the operations that must stay in INT8 when layers are returned to keep within the budget, 0 to 1"
        f" ({Options.int8_share})",
    )
    group.add_argument(
        "--qdq-onnx", type=Path, metavar="FILE", help="take this Q/DQ graph as INT8, after the same checks"
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-batch", type=int, metavar="N", help=f"smallest batch ({Options.min_batch})")
    group.add_argument(
        "--opt-batch", type=int, metavar="N", help=f"batch that an engine is optimised for ({Options.opt_batch})"
    )
    group.add_argument("--max-batch", type=int, metavar="N", help=f"largest batch ({Options.max_batch})")
    group.add_argument(
        "--target",
        metavar="GPUS",
        help="compute capabilities (sm80,sm89), portable or this-gpu; default: this GPU, portable where there is none."
        " What each TensorRT can build for stands in docs/deploy.md",
    )
    group.add_argument(
        "--workspace-mib", type=int, metavar="N", help="largest memory that a layer may use beside its tensors, in MiB"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="keep measured kernel times here: later builds take less long"
    )
    group.add_argument("--version-compatible", action="store_true", help="newer TensorRT runs the engine too")
    group.add_argument("--hardware-compatible", action="store_true", help="Ampere and every newer GPU run the engine")
    group.add_argument(
        "--tf32",
        action="store_true",
        help="faster FP32 on Ampere and newer GPUs: products keep 10 bits, so scores are not those that were compared",
    )
