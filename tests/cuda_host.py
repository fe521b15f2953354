"""`CudaApi` on the host: streams whose work is put off as long as CUDA may put it off, and every misuse a fault.

Work is done when a host call waits for it and not before, and of other streams only what an event asks for. So a copy
that nothing waited for has not happened, and a wrong order shows in the numbers. Besides, it is a fault to use memory
that was given back, to give it back while work on it is under way or twice, to change pinned memory that is being
copied, to call from a thread without the device, to allocate or wait in a capture, and to leave anything open.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from runtime.backends.cuda_api import call_error

POISON = 0xA5
# Device addresses are far from each other, so that one past the end of a buffer is no other buffer.
_FIRST_ADDRESS, _ADDRESS_STEP = 1 << 40, 1 << 32


@dataclass(frozen=True)
class Work:
    """Something a stream does: what it is called, the memory it touches, and how it is done."""

    name: str
    touches: tuple
    do: object


@dataclass
class Marker:
    """A place in a stream that an event was recorded at."""

    stream: int
    reached: bool = False


@dataclass
class Stream:
    """Work that was given and not yet done; in a capture, the thread and what was captured."""

    pending: deque = field(default_factory=deque)
    capture: list | None = None
    capturing_thread: int = 0


class HostCuda:
    """A GPU with `memory_bytes` of memory. `faults` is empty as long as it is used as CUDA may be used.

    `log` names every piece of work in the order in which it was done. `fail` names calls that fail once.
    """

    name = "cuda-bindings"

    def __init__(self, memory_bytes=1 << 30, *, has_graphs=True):
        self.memory_bytes, self.has_graphs = memory_bytes, has_graphs
        self.device, self.pinned, self.streams, self.events, self.graphs = {}, {}, {}, {}, {}
        self.faults, self.log, self.fail, self.calls = [], [], {}, []
        self.closed = False
        self._numbers = itertools.count(1)
        self._current = threading.local()
        self._lock = threading.RLock()

    def fault(self, text):
        self.faults.append(text)
        raise AssertionError(text)

    def used_bytes(self):
        return sum(len(memory) for memory in self.device.values())

    def left(self):
        """Names of what is still open; empty after a clean close."""
        kinds = ("device", "pinned", "streams", "events", "graphs")
        return [kind for kind in kinds if getattr(self, kind)]

    @contextmanager
    def on_device(self):
        depth = getattr(self._current, "depth", 0)
        self._current.depth = depth + 1
        try:
            yield
        finally:
            self._current.depth = depth

    def allocate(self, size_bytes):
        with self._call("allocate", size_bytes=size_bytes, in_capture=False):
            if self.used_bytes() + size_bytes > self.memory_bytes:
                raise call_error("allocate", "out of memory", out_of_memory=True, size_bytes=size_bytes)
            address = _FIRST_ADDRESS + _ADDRESS_STEP * next(self._numbers)
            self.device[address] = np.full(size_bytes, POISON, np.uint8)
            return address

    def free(self, address):
        with self._call("free", in_capture=False):
            if address not in self.device:
                self.fault(f"free of {address:#x}, which is not allocated")
            self._require_idle(address, "free of device memory")
            del self.device[address]

    def allocate_pinned(self, size_bytes):
        with self._call("allocate_pinned", size_bytes=size_bytes, in_capture=False):
            memory = np.full(size_bytes, POISON, np.uint8)
            self.pinned[memory.ctypes.data] = memory
            return memory[:]

    def free_pinned(self, memory):
        with self._call("free_pinned", in_capture=False):
            start = memory.ctypes.data
            if start not in self.pinned:
                self.fault("free of pinned memory that is not allocated")
            self._require_idle(start, "free of pinned memory")
            self.pinned.pop(start)[:] = POISON

    def open_stream(self):
        with self._call("open_stream"):
            return self._opened(self.streams, Stream())

    def close_stream(self, stream):
        with self._call("close_stream", in_capture=False):
            if self.streams[stream].pending:
                self.fault("close of a stream that has work to do")
            del self.streams[stream]

    def synchronize(self, stream):
        with self._call("synchronize", in_capture=False):
            self._run(stream, until=None)

    def open_event(self):
        with self._call("open_event"):
            return self._opened(self.events, None)

    def close_event(self, event):
        with self._call("close_event"):
            del self.events[event]

    def record(self, event, stream):
        with self._call("record"):
            self.events[event] = marker = Marker(stream)
            self.streams[stream].pending.append(marker)

    def stream_waits(self, stream, event):
        with self._call("stream_waits"):
            if self.events[event] is not None:
                self.streams[stream].pending.append((stream, self.events[event]))

    def wait(self, event):
        with self._call("wait", in_capture=False):
            marker = self.events[event]
            if marker is not None and not marker.reached:
                self._run(marker.stream, until=marker)

    def upload(self, address, source, stream):
        expected = source.copy()

        def copy():
            if not np.array_equal(source, expected):
                self.fault("pinned memory was changed while it was being copied to the device")
            self.bytes_at(address, source.nbytes)[:] = source

        self.give(stream, Work("upload", (address, self._pinned_start(source)), copy))

    def download(self, target, address, stream):
        def copy():
            target[:] = self.bytes_at(address, target.nbytes)

        self.give(stream, Work("download", (address, self._pinned_start(target)), copy))
        target[:] = POISON  # whoever reads before the copy is done reads this

    def begin_capture(self, stream):
        with self._call("begin_capture"):
            if self.streams[stream].capture is not None:
                self.fault("a capture inside a capture")
            self.streams[stream].capture = []
            self.streams[stream].capturing_thread = threading.get_ident()

    def end_capture(self, stream):
        state = self.streams[stream]
        captured, state.capture = state.capture, None
        with self._call("end_capture"):
            if captured is None or state.capturing_thread != threading.get_ident():
                self.fault("the end of a capture that this thread did not begin")
            return self._opened(self.graphs, tuple(captured))

    def launch(self, graph, stream):
        with self._call("launch"):
            for start in (start for work in self.graphs[graph] for start in work.touches):
                if start not in self.device:
                    self.fault("launch of a graph whose memory was given back")
            self.log.append("launch")
            self.streams[stream].pending.extend(self.graphs[graph])

    def close_graph(self, graph):
        with self._call("close_graph"):
            for work in self.graphs.pop(graph):
                if any(work is waiting for stream in self.streams.values() for waiting in stream.pending):
                    self.fault("close of a graph that is under way")

    def close(self):
        if self.closed:
            self.fault("closed twice")
        if self.left():
            self.fault(f"closed with {', '.join(self.left())} open")
        self.closed = True

    def give(self, stream, work):
        """Puts work into a stream, or into the graph that is being captured there."""
        with self._call(work.name):
            state = self.streams[stream]
            for start in work.touches:
                if start not in self.device and start not in self.pinned:
                    self.fault(f"{work.name} of memory that is not allocated")
            (state.pending if state.capture is None else state.capture).append(work)

    def bytes_at(self, address, size_bytes):
        """View of device memory, whose bounds are checked."""
        if address not in self.device or size_bytes > len(self.device[address]):
            self.fault(f"{size_bytes} bytes at {address:#x}, which is not allocated so")
        return self.device[address][:size_bytes]

    @contextmanager
    def _call(self, name, *, size_bytes=None, in_capture=True):
        with self._lock:
            self.calls.append(name)
            if not getattr(self._current, "depth", 0):
                self.fault(f"{name} in a thread without the device")
            capturing = [s for s in self.streams.values() if s.capture is not None]
            if not in_capture and any(s.capturing_thread == threading.get_ident() for s in capturing):
                self.fault(f"{name} in a capture")
            if self.fail.get(name, 0) == 1:
                del self.fail[name]
                raise call_error(name, "made to fail", out_of_memory=size_bytes is not None, size_bytes=size_bytes)
            if name in self.fail:
                self.fail[name] -= 1
            yield

    def _opened(self, kind, value):
        handle = next(self._numbers)
        kind[handle] = value
        return handle

    def _run(self, stream, *, until):
        pending = self.streams[stream].pending
        while pending:
            item = pending.popleft()
            if isinstance(item, Marker):
                item.reached = True
                if item is until:
                    return
            elif isinstance(item, Work):
                self.log.append(item.name)
                item.do()
            elif not item[1].reached:
                self._run(item[1].stream, until=item[1])

    def _require_idle(self, start, what):
        waiting = (item for stream in self.streams.values() for item in stream.pending if isinstance(item, Work))
        if any(start in work.touches for work in waiting):
            self.fault(f"{what} that is in use")

    def _pinned_start(self, view):
        start = view.ctypes.data
        if start not in self.pinned:
            self.fault("a copy of memory that is not pinned, or is given back")
        return start
