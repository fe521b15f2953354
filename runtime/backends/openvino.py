"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib
import io
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import (
    Outputs,
    Probe,
    TensorInfo,
    check_graph,
    checked_outputs,
    installed_version,
    refuse_to_open,
    refuse_to_run,
)
from runtime.errors import BackendError
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest

NAME = "openvino"

_INSTALL = 'pip install "ntf-toolkit[cpu]"'
_DTYPES = {"u8": "uint8", "f32": "float32"}

_T = TypeVar("_T")


class OpenVinoBackend:
    """A graph in OpenVINO, with float layers held at float32.

    Args:
        model: content of an .onnx file.
        manifest: of the bundle, which the graph must fit.
        file: name of the artifact, for messages.
        threads: CPU threads of all inferences together; None leaves it to OpenVINO.
        hint: "latency" lets one inference use every thread; "throughput" runs several at once on a few threads each,
            and cuts a batch into as many parts.

    Raises:
        BackendError: the package is missing, or the graph cannot be compiled.
        BundleError: the graph is not what the manifest promises.

    Note:
        `infer` may be called from several threads at once: there are as many infer requests as OpenVINO advises.
    """

    def __init__(
        self, model: bytes, manifest: ModelManifest, *, file: str, threads: int | None = None, hint: str = "latency"
    ) -> None:
        openvino = _import_openvino()
        self.name = NAME
        self.device = "cpu"
        self.version = str(openvino.__version__).split("-")[0]
        self._manifest = manifest
        try:
            compiled = compile_for_cpu(io.BytesIO(model), threads=threads, hint=hint)
        except Exception as error:  # OpenVINO raises plain RuntimeError and its subclasses
            refuse_to_open(NAME, error)
        check_graph(_tensors(compiled.inputs), _tensors(compiled.outputs), manifest, file)
        self.hint = hint
        self.requests = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._parts = self.requests if hint == "throughput" else 1
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.requests):
            self._idle.put(compiled.create_infer_request())

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs for images (N, H, W, 3) uint8.

        Raises:
            BackendError: OpenVINO fails.
        """
        done: list[dict[str, NDArray[np.float32]]] = []
        running: deque[Any] = deque()
        try:
            for part in np.array_split(images, min(self._parts, len(images))):
                request = self._taken(running, done)
                running.append(request)
                # In OpenVINO's own threads: inferred in the caller's (`infer`), graphs that are opened and closed while
                # threads come and go leave a broken heap, as seen with 2026.4.1.
                request.start_async({INPUT_NAME: part}, share_inputs=False)
            while running:
                done.append(_outputs(running[0]))
                self._idle.put(running.popleft())
        except Exception as error:  # OpenVINO raises plain RuntimeError and its subclasses
            refuse_to_run(NAME, error)
        finally:
            for request in running:  # an inference failed, and the others are of no use any more
                request.cancel()
                with suppress(Exception):  # it says that it was cancelled; unsaid, it would say so to the next batch
                    request.wait()
                self._idle.put(request)
        arrays = {name: np.concatenate([outputs[name] for outputs in done]) for name in OUTPUTS}
        return checked_outputs(arrays, len(images), self._manifest)

    def close(self) -> None:
        """Releases the compiled graph."""
        self._idle = queue.SimpleQueue()

    def _taken(self, running: deque[Any], done: list[dict[str, NDArray[np.float32]]]) -> Any:
        """A request that is free. A call waits for those of others only as long as it holds none itself, since calls
        that wait for each other would wait for ever; after that it uses its own first one again."""
        try:
            return self._idle.get(block=not running)
        except queue.Empty:
            done.append(_outputs(running[0]))
            return running.popleft()


def _outputs(request: Any) -> dict[str, NDArray[np.float32]]:
    """What a request computed, waited for and copied: its tensors are overwritten by its next inference."""
    request.wait()
    return {name: np.array(request.results[name]) for name in OUTPUTS}


def compile_for_cpu(*content: Any, threads: int | None = None, hint: str = "latency") -> Any:
    """A graph compiled with float layers held at float32.

    Args:
        content: what `openvino.Core.read_model` takes.
        threads: CPU threads of all inferences together; None leaves it to OpenVINO.
        hint: "latency" or "throughput".
    """
    openvino = _import_openvino()
    # bfloat16 would be chosen by itself on newer CPUs, and the same picture would score differently there.
    config: dict[str, Any] = {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads

    def compiled() -> Any:
        core = openvino.Core()
        return core.compile_model(core.read_model(*content), "CPU", config)

    return _in_own_thread(compiled)


def probe_openvino() -> Probe:
    """Whether OpenVINO would run here on the CPU."""
    version = installed_version("openvino")
    try:
        openvino = _import_openvino()
        devices = _in_own_thread(lambda: openvino.Core().available_devices)
    except BackendError as error:
        return Probe(NAME, False, version, None, error.got, error.remedy)
    except Exception as error:  # what a broken installation raises is not ours to list
        return Probe(NAME, False, version, None, f"{type(error).__name__}: {error}", _INSTALL)
    if "CPU" not in devices:
        found = ", ".join(devices) or "none"
        return Probe(NAME, False, version, None, f"no CPU plug-in (devices: {found})", _INSTALL)
    return Probe(NAME, True, str(openvino.__version__).split("-")[0], "cpu", "the CPU plug-in is there", "")


def _in_own_thread(work: Callable[[], _T]) -> _T:
    """Result of `work`, done in a thread that ends with it.

    OpenVINO's CPU plug-in gives the thread that opens it a signal stack. When two graphs of one thread are freed in
    the order of their opening, that thread keeps a signal stack that is freed too, and the next signal (Ctrl-C, a
    SIGTERM, a SIGCHLD of PyTorch's loaders) ends the process with a segmentation fault.
    """
    with ThreadPoolExecutor(1, "openvino-open") as executor:
        return executor.submit(work).result()


def _import_openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise BackendError(
            f"back-end {NAME}",
            got="no package openvino" if missing else f"an openvino that does not import ({error})",
            wanted="a working installation",
            remedy=_INSTALL,
        ) from error


def _tensors(ports: Any) -> list[TensorInfo]:
    return [
        TensorInfo(
            _port_name(port),
            _DTYPES.get(port.get_element_type().get_type_name(), port.get_element_type().get_type_name()),
            tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()),
        )
        for port in ports
    ]


def _port_name(port: Any) -> str:
    """The name of the contract where a port has it: OpenVINO merges the names of tensors that it folds together."""
    names: set[str] = port.get_names()
    return next((name for name in (INPUT_NAME, *OUTPUTS) if name in names), min(names, default="(no name)"))
