"""What an engine is built for: this GPU, named compute capabilities, or every GPU that TensorRT-RTX knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from export.engine_flavours import TensorRT
from export.errors import ExportError
from runtime.backends.cuda_driver import cuda_device
from runtime.manifest import AMPERE_PLUS

PORTABLE = "portable"
THIS_GPU = "this-gpu"
_TURING = "sm75"
_JETSON = ("sm72", "sm87", "sm110")


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        name: part of its file name: one compute capability, several, "portable" or "ampere-plus".
        capabilities: what it runs on, for the manifest.
        gpu: name of the GPU that TensorRT optimises for; None where the build uses none.
        note: what a reader should know about the choice; empty mostly.
    """

    name: str
    capabilities: tuple[str, ...]
    gpu: str | None = None
    note: str = ""


def resolve_target(tensorrt: TensorRT, asked: str | None, *, hardware_compatible: bool = False) -> Target:
    """What to build for.

    Args:
        tensorrt: the builder.
        asked: "portable", "this-gpu", or compute capabilities with commas ("sm80,sm89"); None takes this GPU where
            there is one that the builder knows, otherwise "portable".
        hardware_compatible: whether the engine shall run on Ampere and everything newer.

    Raises:
        ExportError: the builder cannot build for it; the message says why and what can.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in asked.split(","))) if asked is not None else None
    if tensorrt.flavour.kind == "trt":
        return _trt_target(tensorrt, names, hardware_compatible=hardware_compatible)
    return _rtx_target(tensorrt, names)


def set_capabilities(tensorrt: TensorRT, config: Any, target: Target) -> None:
    """Tell a builder's configuration what to build for; TensorRT itself always builds for the GPU it runs on."""
    if tensorrt.flavour.kind == "trt":
        return
    config.num_compute_capabilities = len(target.capabilities)
    for index, name in enumerate(target.capabilities):
        config.set_compute_capability(tensorrt.module.ComputeCapability.__members__[name.upper()], index)


def _trt_target(tensorrt: TensorRT, asked: Sequence[str] | None, *, hardware_compatible: bool) -> Target:
    here = cuda_device()
    if here is None:
        remedy = "run this where the engine will run; a run can be exported without engines (--no-engine)"
        _refuse(tensorrt, asked, "it builds on a GPU only, and there is none here", remedy)
    if asked is not None and list(asked) not in ([THIS_GPU], [here.target]):
        what = f"it builds for the GPU it runs on, which is {here.target} ({here.name})"
        _refuse(tensorrt, asked, what, "build there, or use --hardware-compatible, or tensorrt_rtx with --target")
    if hardware_compatible:
        if int(here.target[2:]) < 80:
            _refuse(tensorrt, [AMPERE_PLUS], f"this GPU is {here.target}", "build on an Ampere GPU or a newer one")
        return Target(AMPERE_PLUS, (AMPERE_PLUS,), here.name)
    return Target(here.target, (here.target,), here.name)


def _rtx_target(tensorrt: TensorRT, asked: Sequence[str] | None) -> Target:
    supported = _supported(tensorrt)
    here = cuda_device() if asked is None or THIS_GPU in asked else None
    if asked is None:
        if here is not None and here.target in supported:
            return _named([here.target])
        note = "" if here is None else f"no engine of {tensorrt.builder} runs on this GPU, {here.target} ({here.name})"
        return Target(PORTABLE, supported, note=note)
    if PORTABLE in asked:
        if len(asked) > 1:
            _refuse(tensorrt, asked, "portable is every target already", "name portable alone, or the targets alone")
        return Target(PORTABLE, supported)
    if THIS_GPU in asked and here is None:
        _refuse(tensorrt, asked, "there is no GPU here", f"name its compute capability, or use --target {PORTABLE}")
    names = [here.target if here is not None and name == THIS_GPU else name for name in asked]
    for name in names:
        if name not in supported:
            _refuse(tensorrt, [name], *_why_not(name, supported))
    return _named(names)


def _named(names: Sequence[str]) -> Target:
    ordered = tuple(sorted(dict.fromkeys(names), key=lambda name: int(name[2:])))
    return Target("-".join(ordered), ordered)


def _supported(tensorrt: TensorRT) -> tuple[str, ...]:
    names = (name.lower() for name in tensorrt.module.ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(name for name in names if name != _TURING)


def _why_not(name: str, supported: Sequence[str]) -> tuple[str, str]:
    """Why TensorRT-RTX cannot build for a target, and what can be done."""
    known = f"its targets are {', '.join(supported)}"
    if name == _TURING:
        reason = "Turing has no FP32 matrix product in it, and the scores are computed in FP32 at every precision"
        return reason, "use tensorrt on that GPU"
    if name in _JETSON:
        return f"{name} is a Jetson, and {known}", "use the tensorrt of JetPack on the Jetson"
    if name.startswith("sm") and name[2:].isdigit():
        return known, f"use tensorrt on a GPU of {name}"
    return f"that is no compute capability; {known}", f"write sm89, sm80,sm89, {PORTABLE} or {THIS_GPU}"


def _refuse(tensorrt: TensorRT, asked: Sequence[str] | None, got: str, remedy: str) -> NoReturn:
    name = THIS_GPU if asked is None else ",".join(asked)
    raise ExportError(f"--target {name}", got=f"{tensorrt.builder}: {got}", wanted="a target it has", remedy=remedy)
