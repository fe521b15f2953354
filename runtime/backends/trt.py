"""TensorRT engines on the GPU: one engine, and for each worker an execution context with its streams.

An engine is opened by the TensorRT that built it: the module `tensorrt` (flavour "trt") or `tensorrt_rtx` ("rtx").
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Outputs, TensorInfo, check_graph, checked_outputs, output_shapes
from runtime.backends.cuda_api import CudaApi, open_cuda_api
from runtime.backends.cuda_driver import cuda_device
from runtime.backends.trt_installed import MODULES, NAME, import_tensorrt
from runtime.backends.trt_log import listening
from runtime.backends.trt_worker import BatchLayout, Contexts, Slot, Worker
from runtime.engine_check import EngineRuntime, check_batch, check_engine, deserialized_engine
from runtime.errors import BackendError, BundleError, UsageError
from runtime.manifest import INPUT_NAME, OUTPUTS, ArtifactSpec, ModelManifest, ProfileSpec

# With two, one batch is copied while another is computed.
_SLOTS = 2
# A second context fills the GPU where one batch leaves room, and takes its memory again.
_WORKERS = {"latency": 1, "throughput": 2}
_DTYPES = {"UINT8": "uint8", "FLOAT": "float32"}
_KEPT_MESSAGES = 8


class TrtBackend:
    """An engine in TensorRT.

    Args:
        model: content of an .engine file.
        manifest: of the bundle, which the engine must fit.
        file: name of the engine, which the manifest describes.
        hint: "latency" for one execution context, "throughput" for two, which work at once.
        cuda_graphs: launch each batch size as a CUDA graph, which costs the processor less; the first batch of a size
            takes longer. TensorRT-RTX captures them itself.
        max_batch: largest batch that will be asked for; None takes what the engine was built for.
        cuda: memory and streams; None opens the package that is installed. It is closed with the back-end.

    Raises:
        BackendError: there is no GPU, no TensorRT that fits, or too little memory.
        BundleError: the file is no engine, or not what the manifest promises.

    Note:
        `infer` may be called from several threads at once.
    """

    def __init__(
        self,
        model: bytes,
        manifest: ModelManifest,
        *,
        file: str,
        hint: str = "latency",
        cuda_graphs: bool = False,
        max_batch: int | None = None,
        cuda: CudaApi | None = None,
    ) -> None:
        artifact = next((a for a in manifest.artifacts if a.file == file), None)
        flavour = "trt" if artifact is None or artifact.flavour is None else artifact.flavour
        trt = import_tensorrt(flavour)
        here = EngineRuntime(flavour, str(trt.__version__), cuda_device())
        artifact = check_engine(manifest, file, here, max_batch=max_batch)
        self.name, self.device = NAME, "cuda:0"
        self.version = f"{MODULES[flavour]} {here.version}"
        self._manifest, self._artifact = manifest, artifact
        self._messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        # Last in, first out: whoever calls alone meets the same memory and the same graphs again.
        self._free: queue.LifoQueue[tuple[Worker, Slot] | None] = queue.LifoQueue()
        self._workers: list[Worker] = []
        self._slots = 0
        self._closed = False
        self._closing = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._resources = ExitStack()
        with ExitStack() as undone:
            undone.callback(self.close)
            log = self._resources.enter_context(listening(trt, self._hear))
            self._cuda = open_cuda_api() if cuda is None else cuda
            self._resources.callback(self._cuda.close)
            with self._cuda.on_device():
                self._open(trt, log, model, _WORKERS[hint], cuda_graphs)
            undone.pop_all()

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs for images (N, H, W, 3) uint8.

        Raises:
            BackendError: the engine does not take so many pictures, or CUDA or TensorRT fails.
            UsageError: the images have another shape or type, or the back-end is closed.
        """
        self._check_images(images)
        if self._closed:
            _refuse_closed()
        taken = self._free.get()
        if taken is None:
            self._free.put(None)  # for whoever waits as well
            _refuse_closed()
        worker, slot = taken
        try:
            with self._cuda.on_device():
                flat = worker.infer(slot, images)
        finally:
            self._free.put(taken)
        shapes = output_shapes(len(images), self._manifest)
        return checked_outputs(
            {name: flat[name].reshape(shapes[name]) for name in OUTPUTS}, len(images), self._manifest
        )

    def close(self) -> None:
        """Waits for the calls that are under way, then gives everything back; may be called twice."""
        self._closed = True
        with self._closing:
            while self._slots:
                self._free.get()
                self._slots -= 1
            self._free.put(None)
            try:
                if self._workers:
                    with self._cuda.on_device(), ExitStack() as rest:
                        while self._workers:
                            rest.callback(self._workers.pop().close)
            finally:
                self._engine = self._runtime = None
                self._resources.close()

    def _open(self, trt: Any, log: Any, model: bytes, workers: int, cuda_graphs: bool) -> None:
        self._runtime = trt.Runtime(log)
        self._engine = deserialized_engine(self._runtime, model, self._artifact)
        inputs, outputs = _tensors(trt, self._engine)
        check_graph(inputs, outputs, self._manifest, self._artifact.file)
        profile = _profile(self._engine, self._artifact)
        contexts = _contexts(trt, self._engine, self._artifact, cuda_graphs)
        if cuda_graphs and contexts.captures and not self._cuda.has_graphs:
            _refuse_graphs(f"the package {self._cuda.name}, which has no CUDA graphs", "pip install cuda-bindings")
        for _ in range(workers):
            worker = Worker(
                self._cuda, contexts, _layout(self._manifest, profile), slots=_SLOTS,
                graphs=cuda_graphs and contexts.captures, explain=self._said,
            )  # fmt: skip
            self._workers.append(worker)
        # The first slots of the workers come out first, so two callers have a context each.
        for index in reversed(range(_SLOTS)):
            for worker in reversed(self._workers):
                self._free.put((worker, worker.slots[index]))
                self._slots += 1

    def _check_images(self, images: NDArray[np.uint8]) -> None:
        size = self._manifest.preprocess
        wanted = (size.height, size.width, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
            raise UsageError(
                "images",
                got=f"{images.dtype} {images.shape}",
                wanted=f"uint8 (N, {', '.join(map(str, wanted))})",
                remedy="pass what runtime.prepare gives, stacked",
            )
        check_batch(self._artifact, len(images))

    def _hear(self, severity: str, text: str) -> None:
        if severity.endswith("ERROR"):
            self._messages.append(" ".join(text.split()))

    def _said(self) -> str:
        """TensorRT's errors since this was last asked."""
        said = "; ".join(dict.fromkeys(self._messages))
        self._messages.clear()
        return said


@dataclass(frozen=True)
class _Contexts:
    """Of TensorRT: contexts share memory that we own, so that a graph for each batch size costs little."""

    trt: Any
    engine: Any
    captures = True

    @property
    def scratch_bytes(self) -> int:
        return int(self.engine.device_memory_size_v2)

    def new(self, scratch: int) -> Any:
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is not None and scratch:
            context.set_device_memory(scratch, self.scratch_bytes)
        return context


@dataclass(frozen=True)
class _RtxContexts:
    """Of TensorRT-RTX, which compiles kernels while it runs, and so allocates and captures by itself."""

    trt: Any
    engine: Any
    cuda_graphs: bool
    captures = False
    scratch_bytes = 0

    def new(self, scratch: int) -> Any:
        config = self.engine.create_runtime_config()
        if self.cuda_graphs:
            if not hasattr(self.trt, "CudaGraphStrategy"):
                _refuse_graphs(
                    f"tensorrt_rtx {self.trt.__version__}, which has none", "install tensorrt_rtx 1.2 or newer"
                )
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self.engine.create_execution_context(config)


def _contexts(trt: Any, engine: Any, artifact: ArtifactSpec, cuda_graphs: bool) -> Contexts:
    if artifact.flavour == "rtx":
        return _RtxContexts(trt, engine, cuda_graphs)
    return _Contexts(trt, engine)


def _layout(manifest: ModelManifest, profile: ProfileSpec) -> BatchLayout:
    size = manifest.preprocess
    picture = (size.height, size.width, 3)
    shapes = output_shapes(1, manifest)
    float_bytes = np.dtype(np.float32).itemsize
    sizes = {INPUT_NAME: int(np.prod(picture))}
    sizes |= {name: int(np.prod(shapes[name])) * float_bytes for name in OUTPUTS}
    return BatchLayout(picture, sizes, preferred=profile.opt_batch, largest=profile.max_batch)


def _tensors(trt: Any, engine: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of an engine."""
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        dtype = engine.get_tensor_dtype(name).name
        shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(TensorInfo(name, _DTYPES.get(dtype, dtype.lower()), shape))
    return inputs, outputs


def _profile(engine: Any, artifact: ArtifactSpec) -> ProfileSpec:
    """The batches that the engine itself states, which must be those of the manifest."""
    smallest, preferred, largest = (int(shape[0]) for shape in engine.get_tensor_profile_shape(INPUT_NAME, 0))
    found = ProfileSpec(smallest, preferred, largest)
    if found != artifact.profile:
        raise BundleError(
            artifact.file,
            got=f"an engine for batches {smallest}/{preferred}/{largest}",
            wanted=f"the profile of the manifest, {artifact.profile}",
            remedy=f"build it again: python -m export.trt --model BUNDLE --{artifact.precision}",
        )
    return found


def _refuse_graphs(got: str, remedy: str) -> NoReturn:
    raise BackendError(
        "cuda_graphs", got=got, wanted="one that has them", remedy=f"{remedy}, or load without cuda_graphs"
    )


def _refuse_closed() -> NoReturn:
    raise UsageError("back-end trt", got="a closed one", wanted="an open one", remedy="load the model again")
