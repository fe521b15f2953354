"""`CudaApi` by the package cuda-bindings: CUDA's runtime interface, called directly."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda_api import DEVICE, CudaApiName, call_error, refuse_import

# driver_types.h: cudaHostAllocDefault, cudaStreamNonBlocking, cudaEventBlockingSync and cudaEventDisableTiming. A
# blocking event lets the processor sleep instead of spin while it waits.
_PINNED, _NON_BLOCKING_STREAM, _BLOCKING_UNTIMED_EVENT = 0, 0x1, 0x1 | 0x2


class CudaBindings:
    """Memory and streams of the first GPU.

    Raises:
        CudaError: the package does not import, or CUDA does not start.
    """

    name: CudaApiName = "cuda-bindings"
    has_graphs = True

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except Exception as error:  # a broken native library raises more than ImportError
            raise refuse_import(self.name, error) from error
        # Streams, events and graphs as the package has them, by their handle.
        self._objects: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._call("cudaSetDevice", DEVICE)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Makes the device current in the calling thread; CUDA keeps it so."""
        self._call("cudaSetDevice", DEVICE)
        yield

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory."""
        return int(self._call("cudaMalloc", size_bytes, size_bytes=size_bytes))

    def free(self, address: int) -> None:
        """Gives device memory back."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """(size_bytes,) uint8 in pinned host memory."""
        address = int(self._call("cudaHostAlloc", size_bytes, _PINNED, size_bytes=size_bytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Gives pinned memory back."""
        self._call("cudaFreeHost", memory.ctypes.data)

    def open_stream(self) -> int:
        """Handle of a new stream."""
        return self._kept(self._call("cudaStreamCreateWithFlags", _NON_BLOCKING_STREAM))

    def close_stream(self, stream: int) -> None:
        """Ends a stream."""
        self._call("cudaStreamDestroy", self._taken(stream))

    def synchronize(self, stream: int) -> None:
        """Returns when all work of a stream is done."""
        self._call("cudaStreamSynchronize", self._objects[stream])

    def open_event(self) -> int:
        """Handle of a new event."""
        return self._kept(self._call("cudaEventCreateWithFlags", _BLOCKING_UNTIMED_EVENT))

    def close_event(self, event: int) -> None:
        """Ends an event."""
        self._call("cudaEventDestroy", self._taken(event))

    def record(self, event: int, stream: int) -> None:
        """Puts the event behind what the stream has to do so far."""
        self._call("cudaEventRecord", self._objects[event], self._objects[stream])

    def stream_waits(self, stream: int, event: int) -> None:
        """Lets the stream wait for the event."""
        self._call("cudaStreamWaitEvent", self._objects[stream], self._objects[event], 0)

    def wait(self, event: int) -> None:
        """Returns when the event is reached."""
        self._call("cudaEventSynchronize", self._objects[event])

    def upload(self, address: int, source: NDArray[np.uint8], stream: int) -> None:
        """Starts a copy of pinned memory to the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._objects[stream])

    def download(self, target: NDArray[np.uint8], address: int, stream: int) -> None:
        """Starts a copy of device memory to pinned memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._objects[stream])

    def begin_capture(self, stream: int) -> None:
        """Starts a graph; other threads may allocate and copy meanwhile."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._objects[stream], mode)

    def end_capture(self, stream: int) -> int:
        """Handle of the graph, ready to launch."""
        graph = self._call("cudaStreamEndCapture", self._objects[stream])
        try:
            return self._kept(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Starts a graph on a stream."""
        self._call("cudaGraphLaunch", self._objects[graph], self._objects[stream])

    def close_graph(self, graph: int) -> None:
        """Ends a graph."""
        self._call("cudaGraphExecDestroy", self._taken(graph))

    def close(self) -> None:
        """Nothing: the primary context belongs to the process."""

    def _call(self, name: str, *arguments: object, size_bytes: int | None = None) -> Any:
        """What a call of CUDA gives besides its status, which must be success."""
        status, *values = getattr(self._cuda, name)(*arguments)
        codes = self._cuda.cudaError_t
        if status != codes.cudaSuccess:
            text = self._cuda.cudaGetErrorString(status)[1].decode()
            out_of_memory = status == codes.cudaErrorMemoryAllocation
            raise call_error(
                name, f"CUDA error {int(status)}, {text}", out_of_memory=out_of_memory, size_bytes=size_bytes
            )
        return values[0] if values else None

    def _kept(self, opened: Any) -> int:
        with self._lock:
            self._objects[int(opened)] = opened
        return int(opened)

    def _taken(self, handle: int) -> Any:
        with self._lock:
            return self._objects.pop(handle)
