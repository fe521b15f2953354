"""An execution context with its streams, and the memory of the batches that pass through it.

A batch goes up, is computed and comes down on three streams that wait for one another by events, so that one batch is
copied while the one before it is computed. The host waits for its own batch alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda_api import CudaApi
from runtime.errors import BackendError
from runtime.manifest import INPUT_NAME, OUTPUTS

# A graph holds an execution context; batch sizes beyond this many take turns.
_MAX_GRAPHS = 16


@dataclass(frozen=True)
class BatchLayout:
    """Bytes of one picture in each tensor, and how many pictures a batch may have.

    Args:
        picture_shape: (H, W, 3) of the input.
        picture_bytes: of each input and output.
        preferred: pictures that memory is taken for at first.
        largest: pictures of the largest batch.
    """

    picture_shape: tuple[int, ...]
    picture_bytes: Mapping[str, int]
    preferred: int
    largest: int


class Contexts(Protocol):
    """Makes execution contexts of one engine, which share the worker's memory for what lies between their layers."""

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a context needs besides its tensors."""

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are captured from outside, by the worker."""

    def new(self, scratch: int) -> Any:
        """An execution context that uses `scratch_bytes` of device memory at that address."""


@dataclass(frozen=True)
class _Graph:
    """A captured batch size. Its context is its own: a later change of shape or address would make the graph wrong."""

    handle: int
    context: Any


class Slot:
    """Memory of one batch on its way: pinned on the host, and on the device, reused by the next and grown for a larger.

    Note:
        Belongs to one call at a time, and is handed on when nothing of that call is under way any more.
    """

    def __init__(self, cuda: CudaApi, layout: BatchLayout) -> None:
        self._cuda = cuda
        self._layout = layout
        self.capacity = 0
        self.pinned: dict[str, NDArray[np.uint8]] = {}
        self.device: dict[str, int] = {}
        self.graphs: OrderedDict[int, _Graph] = OrderedDict()
        self._events: list[int] = []

    def open(self) -> None:
        """Opens the events; memory comes with the first batch."""
        while len(self._events) < 3:
            self._events.append(self._cuda.open_event())

    @property
    def uploaded(self) -> int:
        """Event: the pictures are on the device."""
        return self._events[0]

    @property
    def computed(self) -> int:
        """Event: the outputs are there, on the device."""
        return self._events[1]

    @property
    def downloaded(self) -> int:
        """Event: the outputs are in pinned memory, and nothing of the batch is under way."""
        return self._events[2]

    def reserve(self, pictures: int) -> None:
        """Makes room for a batch.

        Raises:
            CudaMemoryError: there is too little memory; what the slot had is given back.
        """
        if pictures <= self.capacity:
            return
        wanted = min(max(pictures, 2 * self.capacity, self._layout.preferred), self._layout.largest)
        self.release()
        try:
            for name, size in self._layout.picture_bytes.items():
                self.pinned[name] = self._cuda.allocate_pinned(wanted * size)
                self.device[name] = self._cuda.allocate(wanted * size)
        except BaseException:
            self.release()
            raise
        self.capacity = wanted

    def host(self, name: str, pictures: int) -> NDArray[np.uint8]:
        """Pinned bytes of a tensor of so many pictures."""
        return self.pinned[name][: pictures * self._layout.picture_bytes[name]]

    def release(self) -> None:
        """Gives the memory back, and the graphs, which have its addresses in them."""
        self.capacity = 0
        with ExitStack() as rest:  # each is called, whatever the others raise; the last one first
            while self.pinned:
                rest.callback(self._cuda.free_pinned, self.pinned.popitem()[1])
            while self.device:
                rest.callback(self._cuda.free, self.device.popitem()[1])
            while self.graphs:
                rest.callback(self._cuda.close_graph, self.graphs.popitem()[1].handle)

    def close(self) -> None:
        """Gives everything back."""
        with ExitStack() as rest:
            while self._events:
                rest.callback(self._cuda.close_event, self._events.pop())
            rest.callback(self.release)


class Worker:
    """One execution context of an engine, with streams for copies up, computing and copies down.

    Args:
        cuda: memory and streams.
        contexts: makes its execution contexts.
        layout: of the batches.
        slots: batches that may be on their way at once; with two, one is copied while the other is computed.
        graphs: whether each batch size is captured as a CUDA graph when it first comes.
        explain: TensorRT's own words about what just failed.

    Raises:
        CudaError: CUDA fails.
    """

    def __init__(
        self,
        cuda: CudaApi,
        contexts: Contexts,
        layout: BatchLayout,
        *,
        slots: int,
        graphs: bool,
        explain: Callable[[], str],
    ) -> None:
        self._cuda, self._contexts, self._layout = cuda, contexts, layout
        self._graphs, self._explain = graphs, explain
        # An execution context is not for two threads, and what a batch needs is put into the streams in one piece.
        self._lock = threading.Lock()
        self._scratch = 0
        self._streams: list[int] = []
        self._context: Any = None
        self.slots = [Slot(cuda, layout) for _ in range(slots)]
        try:
            for slot in self.slots:
                slot.open()
            for _ in range(3):
                self._streams.append(cuda.open_stream())
            if contexts.scratch_bytes:
                self._scratch = cuda.allocate(contexts.scratch_bytes)
            self._context = self._new_context()
        except BaseException:
            self.close()
            raise

    def infer(self, slot: Slot, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Outputs of a batch, each (N, ...) flattened to one dimension, in memory of their own.

        Args:
            slot: one of `slots`, which nobody else uses.
            images: (N, H, W, 3) uint8.

        Raises:
            CudaError: CUDA fails, or has too little memory.
            BackendError: TensorRT fails.
        """
        pictures = len(images)
        slot.reserve(pictures)
        np.copyto(slot.host(INPUT_NAME, pictures).reshape(images.shape), images)
        try:
            with self._lock:
                self._start(slot, pictures)
            self._cuda.wait(slot.downloaded)
        except BaseException:
            self._drain()
            raise
        # The next batch of this slot overwrites the pinned memory.
        return {name: slot.host(name, pictures).view(np.float32).copy() for name in OUTPUTS}

    def close(self) -> None:
        """Gives everything back; no call may be under way."""
        with ExitStack() as rest:
            while self._streams:
                rest.callback(self._cuda.close_stream, self._streams.pop())
            if self._scratch:
                rest.callback(self._cuda.free, self._scratch)
                self._scratch = 0
            rest.callback(self._forget_context)
            for slot in self.slots:
                rest.callback(slot.close)

    def _forget_context(self) -> None:
        self._context = None

    def _start(self, slot: Slot, pictures: int) -> None:
        up, compute, down = self._streams
        cuda = self._cuda
        cuda.upload(slot.device[INPUT_NAME], slot.host(INPUT_NAME, pictures), up)
        cuda.record(slot.uploaded, up)
        cuda.stream_waits(compute, slot.uploaded)
        self._compute(slot, pictures, compute)
        cuda.record(slot.computed, compute)
        cuda.stream_waits(down, slot.computed)
        for name in OUTPUTS:
            cuda.download(slot.host(name, pictures), slot.device[name], down)
        cuda.record(slot.downloaded, down)

    def _compute(self, slot: Slot, pictures: int, stream: int) -> None:
        if not self._graphs:
            self._bind(self._context, slot, pictures)
            self._execute(self._context, stream)
        elif pictures in slot.graphs:
            slot.graphs.move_to_end(pictures)
            self._cuda.launch(slot.graphs[pictures].handle, stream)
        else:
            self._capture(slot, pictures, stream)

    def _capture(self, slot: Slot, pictures: int, stream: int) -> None:
        """Computes a batch, and keeps how as a graph."""
        while len(slot.graphs) >= _MAX_GRAPHS:
            self._cuda.close_graph(slot.graphs.popitem(last=False)[1].handle)
        context = self._new_context()
        self._bind(context, slot, pictures)
        # The first run after a change of shape does work that is not to be captured, so it is a run of its own.
        self._execute(context, stream)
        try:
            slot.graphs[pictures] = _Graph(self._captured(context, stream), context)
        except BackendError as error:
            raise BackendError(
                "cuda_graphs",
                got=f"an engine that cannot be captured ({error.subject}: {error.got})",
                wanted="one whose work has a fixed course",
                remedy="load without cuda_graphs",
            ) from error

    def _captured(self, context: Any, stream: int) -> int:
        """Handle of a graph of one inference."""
        self._cuda.begin_capture(stream)
        try:
            self._execute(context, stream)
        except BaseException:
            # The stream leaves its capture, whose graph is of no use.
            with suppress(BackendError):
                self._cuda.close_graph(self._cuda.end_capture(stream))
            raise
        return self._cuda.end_capture(stream)

    def _bind(self, context: Any, slot: Slot, pictures: int) -> None:
        if not context.set_input_shape(INPUT_NAME, (pictures, *self._layout.picture_shape)):
            self._refuse(f"a batch of {pictures} that the execution context does not take")
        for name, address in slot.device.items():
            if not context.set_tensor_address(name, address):
                self._refuse(f"an address of {name} that the execution context does not take")

    def _execute(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            self._refuse("an inference that TensorRT could not start")

    def _new_context(self) -> Any:
        context = self._contexts.new(self._scratch)
        if context is None:
            self._refuse("no execution context")
        return context

    def _drain(self) -> None:
        """Waits until nothing touches the slot any more; the error that led here is the one to tell."""
        for stream in self._streams:
            with suppress(BackendError):
                self._cuda.synchronize(stream)

    def _refuse(self, got: str) -> NoReturn:
        said = self._explain()
        raise BackendError(
            "back-end trt",
            got=f"{got} ({said})" if said else got,
            wanted="an inference that succeeds",
            remedy="load the model again; if it stays, build the engine again here, or choose another backend",
        )
