"""`CudaApi` by the package pycuda, on the primary context of the device.

pycuda ends a stream, an event or an allocation when its last reference goes, and does so rightly only in a thread that
has the context, so objects are kept here and dropped inside `on_device`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda_api import DEVICE, CudaApiName, CudaError, call_error, refuse_import

# cuda.h: CU_STREAM_NON_BLOCKING; pycuda has no name for it.
_NON_BLOCKING_STREAM = 0x1


class PyCuda:
    """Memory and streams of the first GPU. It has no graphs, because pycuda has none.

    Raises:
        CudaError: the package does not import, or CUDA does not start.
    """

    name: CudaApiName = "pycuda"
    has_graphs = False

    def __init__(self) -> None:
        try:
            self._driver: Any = importlib.import_module("pycuda.driver")
        except Exception as error:  # a broken native library raises more than ImportError
            raise refuse_import(self.name, error) from error
        self._objects: dict[int, Any] = {}
        self._handles = iter(range(1, 1 << 62))
        self._lock = threading.Lock()
        with self._errors("cuInit"):
            self._driver.init()
            # The runtime interface, and so TensorRT, uses this context; one of our own would not see its memory.
            self._context: Any = self._driver.Device(DEVICE).retain_primary_context()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Makes the context current in the calling thread, and takes it off again."""
        with self._errors("cuCtxPushCurrent"):
            self._context.push()
        try:
            yield
        finally:
            with self._errors("cuCtxPopCurrent"):
                self._context.pop()

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory."""
        with self._errors("cuMemAlloc", size_bytes):
            memory = self._driver.mem_alloc(size_bytes)
        return self._kept(int(memory), memory)

    def free(self, address: int) -> None:
        """Gives device memory back."""
        with self._errors("cuMemFree"):
            self._taken(address).free()

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """(size_bytes,) uint8 in pinned host memory."""
        with self._errors("cuMemHostAlloc", size_bytes):
            memory: NDArray[np.uint8] = self._driver.pagelocked_empty(size_bytes, np.uint8)
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Gives pinned memory back."""
        allocation: Any = memory.base
        with self._errors("cuMemFreeHost"):
            allocation.free()

    def open_stream(self) -> int:
        """Handle of a new stream."""
        with self._errors("cuStreamCreate"):
            stream = self._driver.Stream(_NON_BLOCKING_STREAM)
        return self._kept(int(stream.handle), stream)

    def close_stream(self, stream: int) -> None:
        """Ends a stream."""
        self._taken(stream)

    def synchronize(self, stream: int) -> None:
        """Returns when all work of a stream is done."""
        with self._errors("cuStreamSynchronize"):
            self._objects[stream].synchronize()

    def open_event(self) -> int:
        """Handle of a new event."""
        flags = self._driver.event_flags
        with self._errors("cuEventCreate"):
            event = self._driver.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING)
        # pycuda does not show the handle of an event.
        return self._kept(-next(self._handles), event)

    def close_event(self, event: int) -> None:
        """Ends an event."""
        self._taken(event)

    def record(self, event: int, stream: int) -> None:
        """Puts the event behind what the stream has to do so far."""
        with self._errors("cuEventRecord"):
            self._objects[event].record(self._objects[stream])

    def stream_waits(self, stream: int, event: int) -> None:
        """Lets the stream wait for the event."""
        with self._errors("cuStreamWaitEvent"):
            self._objects[stream].wait_for_event(self._objects[event])

    def wait(self, event: int) -> None:
        """Returns when the event is reached."""
        with self._errors("cuEventSynchronize"):
            self._objects[event].synchronize()

    def upload(self, address: int, source: NDArray[np.uint8], stream: int) -> None:
        """Starts a copy of pinned memory to the device."""
        with self._errors("cuMemcpyHtoDAsync"):
            self._driver.memcpy_htod_async(address, source, self._objects[stream])

    def download(self, target: NDArray[np.uint8], address: int, stream: int) -> None:
        """Starts a copy of device memory to pinned memory."""
        with self._errors("cuMemcpyDtoHAsync"):
            self._driver.memcpy_dtoh_async(target, address, self._objects[stream])

    def begin_capture(self, stream: int) -> None:
        """Refused: pycuda has no graphs."""
        _refuse_graphs()

    def end_capture(self, stream: int) -> int:
        """Refused: pycuda has no graphs."""
        _refuse_graphs()

    def launch(self, graph: int, stream: int) -> None:
        """Refused: pycuda has no graphs."""
        _refuse_graphs()

    def close_graph(self, graph: int) -> None:
        """Refused: pycuda has no graphs."""
        _refuse_graphs()

    def close(self) -> None:
        """Gives back the hold on the primary context."""
        self._context.detach()

    @contextmanager
    def _errors(self, call: str, size_bytes: int | None = None) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            out_of_memory = isinstance(error, self._driver.MemoryError)
            raise call_error(call, str(error), out_of_memory=out_of_memory, size_bytes=size_bytes) from error

    def _kept(self, handle: int, opened: Any) -> int:
        with self._lock:
            self._objects[handle] = opened
        return handle

    def _taken(self, handle: int) -> Any:
        with self._lock:
            return self._objects.pop(handle)


def _refuse_graphs() -> NoReturn:
    raise CudaError(
        "CUDA graphs",
        got="the package pycuda, which has none",
        wanted="cuda-bindings",
        remedy="pip install cuda-bindings",
    )
