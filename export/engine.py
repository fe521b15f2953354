"""TensorRT engines from an ONNX graph: one small adapter over `tensorrt` 10 and 11 and `tensorrt_rtx`.

This module needs neither torch nor onnx: an engine can be built from a bundle where only TensorRT is installed.
"""

from __future__ import annotations

import functools
import importlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from export.errors import ExportError
from runtime.errors import BackendError
from runtime.manifest import INPUT_NAME, OUTPUTS, ProfileSpec

if TYPE_CHECKING:
    from rich.progress import Progress

INSTALL = 'pip install "ntf-toolkit[rtx]" (builds without a GPU) or "ntf-toolkit[trt]" from NVIDIA\'s index'
PORTABLE = "portable"
# Turing has no FP32 matrix product in TensorRT-RTX, and the score layers are FP32 at every precision.
_REFUSED_TARGETS = ("SM75",)
_MODULES: tuple[tuple[str, Literal["trt", "rtx"]], ...] = (("tensorrt", "trt"), ("tensorrt_rtx", "rtx"))
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$", re.MULTILINE)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NO_DRIVER = re.compile(r"\s*\(?cudaError\w* 35[^.]*\.?\)?|CUDA initialization failure with error: 35[^.]*\.?")


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT.

    Attributes:
        module: the Python module.
        flavour: "trt", whose engines fit the GPU they were built on, or "rtx", which names its targets.
        version: of the module.
    """

    module: Any
    flavour: Literal["trt", "rtx"]
    version: str

    @property
    def builder(self) -> str:
        """Module and version, as the manifest names them."""
        return f"{self.module.__name__} {self.version}"


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine, as the build log lists it: name, kind and the data types it reads and writes."""

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    output_types: tuple[str, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine and what is to be known about it."""

    content: bytes
    flavour: Literal["trt", "rtx"]
    builder: str
    target: str
    targets: tuple[str, ...]
    profile: ProfileSpec
    layers: tuple[EngineLayer, ...]
    build_seconds: float


def find_tensorrt() -> TensorRT:
    """The first of `tensorrt`, `tensorrt_rtx` that imports.

    Raises:
        BackendError: neither does; the message says what to install.
    """
    reasons = []
    for name, flavour in _MODULES:
        try:
            module = importlib.import_module(name)
            return TensorRT(module, flavour, str(module.__version__))
        except (ImportError, OSError, AttributeError) as error:  # a stub package, or libraries that do not load
            reasons.append(f"{name}: {error}")
    raise BackendError(
        "TensorRT",
        got=f"no module that imports ({'; '.join(reasons)})",
        wanted="tensorrt or tensorrt_rtx",
        remedy=INSTALL,
    )


def engine_from_onnx(
    model: bytes, profile: ProfileSpec, *, tensorrt: TensorRT, label: str, progress: Progress | None = None
) -> BuiltEngine:
    """Engine of a strongly typed network: its types are those of the graph.

    Args:
        model: content of an .onnx file that keeps the graph contract.
        profile: smallest, preferred and largest batch.
        tensorrt: from `find_tensorrt`.
        label: what is built, for messages and the progress bar.
        progress: shows the build's phases.

    Raises:
        ExportError: the graph does not parse, lacks the contract's outputs, or does not build.
    """
    trt, log = tensorrt.module, _logger(tensorrt.module)
    with _recording(log) as lines:
        builder = trt.Builder(log)
        network = _parse(trt, builder, log, model, lines, label)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _add_profile(builder, config, network, profile, label)
        target, targets = _set_targets(tensorrt, config)
        monitor = _monitor(trt)(progress, label) if progress is not None else None
        if monitor is not None:
            config.progress_monitor = monitor
        started = time.perf_counter()
        engine = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - started
        if engine is None:
            raise _refusal(label, _errors(lines) or "no engine and no message", "an engine")
        return BuiltEngine(
            content=bytes(engine),
            flavour=tensorrt.flavour,
            builder=tensorrt.builder,
            target=target,
            targets=targets,
            profile=profile,
            layers=read_layers(lines),
            build_seconds=seconds,
        )


def read_layers(messages: list[tuple[str, str]]) -> tuple[EngineLayer, ...]:
    """Layers of an engine from the messages of a build with detailed profiling."""
    plan = next((text for _, text in reversed(messages) if text.startswith("Layers:")), "")
    return tuple(
        EngineLayer(
            match["name"],
            match["kind"],
            _types(match["rest"], "Inputs", "Constants"),
            _types(match["rest"], "Constants", "Outputs"),
            _types(match["rest"], "Outputs", "TacticName"),
        )
        for match in _LAYER.finditer(plan)
    )


def _parse(trt: Any, builder: Any, log: Any, model: bytes, lines: list[tuple[str, str]], label: str) -> Any:
    # TensorRT 11 has strongly typed networks only, and no flag for them.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    # The parser says True to an empty file, so the network is looked at as well.
    if not parser.parse(model):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise _refusal(label, "; ".join(errors) or _errors(lines) or "a file it cannot parse", "an ONNX graph")
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    if network.num_layers == 0 or inputs != [INPUT_NAME] or sorted(outputs) != sorted(OUTPUTS):
        got = f"{network.num_layers} layers, inputs {inputs}, outputs {outputs}"
        raise _refusal(label, got, f"a network with input {INPUT_NAME} and outputs {', '.join(OUTPUTS)}")
    return network


def _add_profile(builder: Any, config: Any, network: Any, profile: ProfileSpec, label: str) -> None:
    rest = tuple(network.get_input(0).shape)[1:]
    shapes = [(size, *rest) for size in (profile.min_batch, profile.opt_batch, profile.max_batch)]
    optimization = builder.create_optimization_profile()
    optimization.set_shape(INPUT_NAME, *shapes)
    if config.add_optimization_profile(optimization) < 0:
        raise _refusal(label, f"a refused optimization profile {shapes}", "a profile that fits the input")


def _set_targets(tensorrt: TensorRT, config: Any) -> tuple[str, tuple[str, ...]]:
    """Name of the target and the compute capabilities it covers: this GPU, or all that RTX knows without one."""
    here = _this_gpu()
    if tensorrt.flavour == "trt":
        return (here or "gpu", (here,) if here else ())
    known = tensorrt.module.ComputeCapability
    supported = [
        str(name).lower() for name in known.__members__ if name.startswith("SM") and name not in _REFUSED_TARGETS
    ]
    chosen = [here] if here is not None and here in supported else supported
    config.num_compute_capabilities = len(chosen)
    for index, name in enumerate(chosen):
        config.set_compute_capability(known.__members__[name.upper()], index)
    return (chosen[0] if len(chosen) == 1 else PORTABLE), tuple(chosen)


def _this_gpu() -> str | None:
    """Compute capability of the first GPU as "sm89"; None without a GPU, or where nothing can tell."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    error, device = runtime.cudaGetDevice()
    if error != runtime.cudaError_t.cudaSuccess:
        return None
    attribute = runtime.cudaDeviceAttr
    _, major = runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, device)
    _, minor = runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, device)
    return f"sm{major}{minor}"


@functools.cache
def _logger(trt: Any) -> Any:
    """The one logger of this process: TensorRT keeps the first it is given, and a second one has crashed it."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] | None = None

        def log(self, severity: Any, message: str) -> None:
            wanted = severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING") or message.startswith("Layers:")
            if self.lines is not None and wanted:
                self.lines.append((severity.name, message))

    return Recorder()


@contextmanager
def _recording(log: Any) -> Iterator[list[tuple[str, str]]]:
    lines: list[tuple[str, str]] = []
    log.lines = lines
    try:
        yield lines
    finally:
        log.lines = None


@functools.cache
def _monitor(trt: Any) -> Any:
    class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phases of a build; called from several threads, which rich allows."""

        def __init__(self, progress: Progress, label: str) -> None:
            super().__init__()
            self.progress, self.label = progress, label
            self.tasks: dict[str, Any] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.tasks[phase] = self.progress.add_task(f"{self.label}: {phase}", total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.tasks:
                self.progress.update(self.tasks[phase], completed=step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            task = self.tasks.pop(phase, None)
            if task is not None:
                self.progress.remove_task(task)

    return BuildProgress


def _types(rest: str, start: str, stop: str) -> tuple[str, ...]:
    section = rest.partition(f"{start}: ")[2].partition(f", {stop}: ")[0]
    return tuple(_DATATYPE.findall(section))


def _errors(lines: list[tuple[str, str]]) -> str:
    texts = [_NO_DRIVER.sub("", text).strip() for severity, text in lines if severity.endswith("ERROR")]
    return "; ".join(text for text in texts if text)


def _refusal(label: str, got: str, wanted: str) -> ExportError:
    remedy = "check the graph with onnx.checker; the ONNX files themselves are usable with --no-engine"
    return ExportError(f"TensorRT engine {label}", got=got, wanted=wanted, remedy=remedy)
