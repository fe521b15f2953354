"""TensorRT engines from an ONNX graph, by `tensorrt` 10 or 11 or by `tensorrt_rtx`.

This module needs neither torch nor onnx: an engine can be built from a bundle where only TensorRT is installed.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.engine_flavours import HARDWARE_COMPATIBLE, TIMING_CACHE, VERSION_COMPATIBLE, WORKSPACE, TensorRT
from export.engine_log import Messages, errors_of, recorded_messages, without_driver_errors
from export.engine_plan import EngineLayer, read_layers
from export.engine_progress import Display, LineDisplay, build_monitor, run_stoppable
from export.engine_targets import Target, resolve_target, set_capabilities
from export.errors import ExportError
from runtime.manifest import INPUT_NAME, OUTPUTS, ProfileSpec

_INPUT_RANK = 4


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built, besides its graph and its batches.

    Attributes:
        target: see `export.engine_targets.resolve_target`.
        workspace_mib: limit of the memory that a layer may use beside its tensors, in MiB; None leaves it to TensorRT.
        timing_cache: file that measured kernel times are kept in between builds; None keeps none.
        version_compatible: build an engine that newer versions of TensorRT run too.
        hardware_compatible: build an engine that runs on Ampere and every newer GPU.
        tf32: let products of FP32 tensors be rounded to the 10 bits of TF32, which is faster on Ampere and newer GPUs.
    """

    target: str | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine and what is to be known about it."""

    content: bytes
    flavour: Literal["trt", "rtx"]
    builder: str
    target: Target
    profile: ProfileSpec
    layers: tuple[EngineLayer, ...]
    build_seconds: float


def check_settings(tensorrt: TensorRT, settings: EngineSettings) -> None:
    """Refuse what this TensorRT does not have, or what makes no sense.

    Raises:
        ExportError: with the reason.
    """
    asked = {
        VERSION_COMPATIBLE: settings.version_compatible,
        HARDWARE_COMPATIBLE: settings.hardware_compatible,
        TIMING_CACHE: settings.timing_cache is not None,
    }
    for option, reason in tensorrt.flavour.lacks.items():
        if asked.get(option):
            got = f"{tensorrt.builder}, where {reason}"
            raise ExportError(option, got=got, wanted="a builder that has it", remedy="leave the option out")
    if settings.workspace_mib is not None and settings.workspace_mib < 1:
        got = f"{settings.workspace_mib} MiB"
        raise ExportError(WORKSPACE, got=got, wanted="at least 1 MiB", remedy="leave it out to set no limit")
    path = settings.timing_cache
    if path is not None and not path.parent.is_dir():
        raise _timing_error(path, f"no folder {path.parent}", "a file in a folder that is there", "make the folder")


def engine_from_onnx(
    model: bytes,
    profile: ProfileSpec,
    *,
    tensorrt: TensorRT,
    label: str,
    settings: EngineSettings | None = None,
    display: Display | None = None,
) -> BuiltEngine:
    """Engine of a strongly typed network: its types are those of the graph.

    Args:
        model: content of an .onnx file that keeps the graph contract.
        profile: smallest, preferred and largest batch.
        tensorrt: from `find_tensorrt`.
        label: what is built, for messages.
        settings: how; None takes the defaults.
        display: shows the build's phases.

    Raises:
        ExportError: the builder lacks a setting or the target, or the graph does not parse, lacks the contract's inputs
            and outputs, or does not build.
        KeyboardInterrupt: Ctrl-C stopped the build.
    """
    trt, settings = tensorrt.module, settings or EngineSettings()
    check_settings(tensorrt, settings)
    target = resolve_target(tensorrt, settings.target, hardware_compatible=settings.hardware_compatible)
    with recorded_messages(trt) as (log, messages):
        builder = trt.Builder(log)
        network = _parsed(tensorrt, builder, log, model, messages, label)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _add_profile(builder, config, network, profile, messages, label)
        set_capabilities(tensorrt, config, target)
        _apply(trt, config, settings)
        monitor = config.progress_monitor = build_monitor(trt, label, display)
        started = time.perf_counter()
        engine = run_stoppable(lambda: builder.build_serialized_network(network, config), monitor)
        seconds = time.perf_counter() - started
        if engine is None:
            raise _refusal(label, errors_of(messages) or "no engine and no message", "an engine")
        if settings.timing_cache is not None:
            _keep_timings(config, settings.timing_cache, display or LineDisplay())
        layers = read_layers(messages)
    return BuiltEngine(bytes(engine), tensorrt.flavour.kind, tensorrt.builder, target, profile, layers, seconds)


def _parsed(tensorrt: TensorRT, builder: Any, log: Any, model: bytes, messages: Messages, label: str) -> Any:
    trt = tensorrt.module
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if tensorrt.flavour.typing_flag else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    # The parser says True to an empty file, so that is told apart before, and the network is looked at afterwards.
    if not model or not parser.parse(model):
        errors = "; ".join(_parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        got = errors or errors_of(messages) or ("an empty file" if not model else "a file it cannot parse")
        raise _refusal(label, got, "an ONNX graph of operators that TensorRT has")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    names = [tensor.name for tensor in inputs]
    if network.num_layers == 0 or names != [INPUT_NAME] or sorted(outputs) != sorted(OUTPUTS):
        got = f"{network.num_layers} layers, inputs {names}, outputs {outputs}"
        raise _refusal(label, got, f"a network with input {INPUT_NAME} and outputs {', '.join(OUTPUTS)}")
    shape = tuple(inputs[0].shape)
    if len(shape) != _INPUT_RANK or shape[0] != -1:
        raise _refusal(label, f"input {INPUT_NAME} of shape {shape}", "(N, H, W, 3) with any N")
    return network


def _parser_error(error: Any) -> str:
    node = f"node {error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
    return node + without_driver_errors(error.desc())


def _add_profile(builder: Any, config: Any, network: Any, profile: ProfileSpec, messages: Messages, label: str) -> None:
    rest = tuple(network.get_input(0).shape)[1:]
    shapes = [(size, *rest) for size in (profile.min_batch, profile.opt_batch, profile.max_batch)]
    optimization = builder.create_optimization_profile()
    optimization.set_shape(INPUT_NAME, *shapes)
    if config.add_optimization_profile(optimization) < 0:
        got = f"shapes {shapes}, which TensorRT refuses ({errors_of(messages) or 'it does not say why'})"
        raise _refusal(label, got, "an optimization profile that fits the input")


def _apply(trt: Any, config: Any, settings: EngineSettings) -> None:
    # TensorRT allows TF32 unless it is told not to. What a graph keeps in FP32 was compared with PyTorch in full FP32,
    # and in FP16 and INT8 graphs these are the very nodes that lost too much in fewer bits: so at every precision.
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.timing_cache is not None:
        _use_timings(config, settings.timing_cache)


def _use_timings(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise _timing_error(path, str(error.strerror), "a readable file", "check the path") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        got = "a cache that TensorRT refuses: it is damaged, or of another version or GPU"
        raise _timing_error(path, got, "one that this TensorRT wrote on this GPU", "delete it, or name another file")


def _keep_timings(config: Any, path: Path, display: Display) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # The engine is there, after a long build perhaps; without times the next one only takes as long again.
        display.say(f"note: {TIMING_CACHE} {path} was not written ({error.strerror or error}); the engine is whole")


def _timing_error(path: Path, got: str, wanted: str, remedy: str) -> ExportError:
    return ExportError(f"{TIMING_CACHE} {path}", got=got, wanted=wanted, remedy=remedy)


def _refusal(label: str, got: str, wanted: str) -> ExportError:
    remedy = "check the graph with onnx.checker; without an engine the ONNX files are usable still"
    return ExportError(f"TensorRT engine {label}", got=got, wanted=wanted, remedy=remedy)
