"""Device memory, streams, events and graphs of one GPU, as far as engines need them.

Two packages offer them, `cuda-bindings` and `pycuda`; both use the primary context of the device, which TensorRT uses
as well. Addresses and handles are plain integers, so whoever calls is the same with either, and with a stand-in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import installed_version
from runtime.errors import BackendError

CudaApiName: TypeAlias = Literal["cuda-bindings", "pycuda"]

INSTALL = 'pip install "ntf-toolkit[gpu]" for cuda-bindings, or "ntf-toolkit[pycuda]"'
DEVICE = 0


class CudaError(BackendError):
    """A call of CUDA failed."""


class CudaMemoryError(CudaError):
    """There is not enough memory on the device, or not enough host memory that can be pinned."""


class CudaApi(Protocol):
    """What is asked of CUDA; every call is made inside `on_device`, and may be made from any thread.

    Note:
        Each call raises CudaError where CUDA fails; a failure of earlier work of the device may show in any of them.
    """

    name: CudaApiName
    has_graphs: bool

    def on_device(self) -> AbstractContextManager[None]:
        """Makes the device current in the calling thread for as long as it is open."""

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory. Raises CudaMemoryError where there is too little."""

    def free(self, address: int) -> None:
        """Gives device memory back; nothing that uses it may be under way."""

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """(size_bytes,) uint8 in pinned host memory. Raises CudaMemoryError where there is too little."""

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Gives pinned memory back; no view of it may be used afterwards."""

    def open_stream(self) -> int:
        """Handle of a new stream that does not wait for the default stream."""

    def close_stream(self, stream: int) -> None:
        """Ends a stream that is idle."""

    def synchronize(self, stream: int) -> None:
        """Returns when all work of a stream is done; other threads run meanwhile."""

    def open_event(self) -> int:
        """Handle of a new event."""

    def close_event(self, event: int) -> None:
        """Ends an event."""

    def record(self, event: int, stream: int) -> None:
        """Puts the event behind what the stream has to do so far; an earlier place of it is forgotten."""

    def stream_waits(self, stream: int, event: int) -> None:
        """What the stream is given from now on starts when the event, as last recorded, is reached."""

    def wait(self, event: int) -> None:
        """Returns when the event, as last recorded, is reached; other threads run meanwhile."""

    def upload(self, address: int, source: NDArray[np.uint8], stream: int) -> None:
        """Starts a copy of pinned memory to the device; the source is left alone until it is done."""

    def download(self, target: NDArray[np.uint8], address: int, stream: int) -> None:
        """Starts a copy of device memory to pinned memory; the target is not read until it is done."""

    def begin_capture(self, stream: int) -> None:
        """What this thread gives the stream from now on becomes part of a graph, and is not done."""

    def end_capture(self, stream: int) -> int:
        """Handle of a graph of what the stream was given since `begin_capture`, ready to launch."""

    def launch(self, graph: int, stream: int) -> None:
        """Starts a graph on a stream."""

    def close_graph(self, graph: int) -> None:
        """Ends a graph that is not under way."""

    def close(self) -> None:
        """Gives back the hold on the device; everything else was closed before."""


def installed_cuda_api() -> CudaApiName | None:
    """The package that `open_cuda_api` would take: cuda-bindings before pycuda; None where neither is installed."""
    if installed_version("cuda-bindings") is not None:
        return "cuda-bindings"
    return "pycuda" if installed_version("pycuda") is not None else None


def open_cuda_api(name: CudaApiName | None = None) -> CudaApi:
    """Memory and streams of the first GPU.

    Args:
        name: of the package; None takes the one that is installed.

    Raises:
        CudaError: the package does not import, or the device does not start.
    """
    name = name or installed_cuda_api()
    if name == "cuda-bindings":
        from runtime.backends.cuda_bindings import CudaBindings

        return CudaBindings()
    if name == "pycuda":
        from runtime.backends.cuda_pycuda import PyCuda

        return PyCuda()
    raise CudaError(
        "device memory for engines",
        got="neither the package cuda-bindings nor pycuda",
        wanted="one of them",
        remedy=INSTALL,
    )


def refuse_import(name: CudaApiName, error: Exception) -> CudaError:
    """The error for a package that is missing or does not import."""
    return CudaError(
        f"package {name}", got=f"{type(error).__name__}: {error}", wanted="one that imports", remedy=INSTALL
    )


def call_error(call: str, detail: str, *, out_of_memory: bool, size_bytes: int | None = None) -> CudaError:
    """The error for a call of CUDA that failed.

    Args:
        call: name of the call.
        detail: what CUDA says.
        out_of_memory: whether that is too little memory.
        size_bytes: what was asked for, where it was memory.
    """
    if out_of_memory:
        asked = "more memory than is free" if size_bytes is None else f"no memory for {size_bytes} bytes"
        return CudaMemoryError(
            call,
            got=f"{asked} ({detail})",
            wanted="enough memory on the GPU",
            remedy="score fewer pictures at once, end other programs on this GPU, or load with hint='latency'",
        )
    return CudaError(
        call,
        got=detail,
        wanted="a call that succeeds",
        remedy="load the model again; if it stays, restart the program, and check the GPU with nvidia-smi",
    )
