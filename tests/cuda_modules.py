"""Stand-ins for the modules `cuda.bindings.runtime` and `pycuda.driver` on a `HostCuda`.

They have the names and the signatures of the real ones, and take handles only as the objects that these give out.
"""

from __future__ import annotations

import ctypes
import enum
import types

import numpy as np

from runtime.backends.cuda_api import CudaMemoryError
from runtime.errors import BackendError


class Handle:
    """A stream, event or graph as cuda-bindings has them: opaque, with a number."""

    def __init__(self, number):
        self.number = number

    def __int__(self):
        return self.number


cudaError_t = enum.IntEnum(
    "cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorIllegalAddress": 700}
)
cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})


def cuda_bindings_module(host):
    """The module of cuda-bindings: functions that give a tuple of their status and what they made."""
    module = types.ModuleType("cuda.bindings.runtime")
    module.cudaError_t, module.cudaMemcpyKind = cudaError_t, cudaMemcpyKind
    module.cudaStreamCaptureMode = cudaStreamCaptureMode

    def set_device(device):
        assert device == 0
        host._current.depth = 1

    def host_alloc(size, flags):
        assert flags == 0
        return host.allocate_pinned(size).ctypes.data

    def copy(target, source, count, kind, stream):
        if kind is cudaMemcpyKind.cudaMemcpyHostToDevice:
            host.upload(target, _memory(source, count), _number(stream))
        else:
            host.download(_memory(target, count), source, _number(stream))

    def wait_event(stream, event, flags):
        assert flags == 0
        host.stream_waits(_number(stream), _number(event))

    def begin_capture(stream, mode):
        assert mode is cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        host.begin_capture(_number(stream))

    functions = {
        "cudaSetDevice": set_device,
        "cudaMalloc": host.allocate,
        "cudaFree": host.free,
        "cudaHostAlloc": host_alloc,
        "cudaFreeHost": lambda address: host.free_pinned(host.pinned[address]),
        "cudaStreamCreateWithFlags": lambda flags: Handle(host.open_stream() if flags == 1 else None),
        "cudaStreamDestroy": lambda stream: host.close_stream(_number(stream)),
        "cudaStreamSynchronize": lambda stream: host.synchronize(_number(stream)),
        "cudaEventCreateWithFlags": lambda flags: Handle(host.open_event() if flags == 3 else None),
        "cudaEventDestroy": lambda event: host.close_event(_number(event)),
        "cudaEventRecord": lambda event, stream: host.record(_number(event), _number(stream)),
        "cudaEventSynchronize": lambda event: host.wait(_number(event)),
        "cudaStreamWaitEvent": wait_event,
        "cudaMemcpyAsync": copy,
        "cudaStreamBeginCapture": begin_capture,
        # A graph and what is instantiated from it share a number here: the first is destroyed at once.
        "cudaStreamEndCapture": lambda stream: Handle(host.end_capture(_number(stream))),
        "cudaGraphInstantiate": lambda graph, flags: Handle(_number(graph)),
        "cudaGraphDestroy": lambda graph: host.calls.append(f"destroyed {_number(graph)}"),
        "cudaGraphLaunch": lambda graph, stream: host.launch(_number(graph), _number(stream)),
        "cudaGraphExecDestroy": lambda graph: host.close_graph(_number(graph)),
    }
    for name, function in functions.items():
        setattr(module, name, _with_status(function))
    module.cudaGetErrorString = lambda status: (cudaError_t.cudaSuccess, status.name.encode())
    return module


def pycuda_module(host):
    """The module `pycuda.driver`: objects that end when they are dropped, on the primary context of a device."""
    module = types.ModuleType("pycuda.driver")
    module.Error = type("Error", (Exception,), {})
    module.MemoryError = type("MemoryError", (module.Error,), {})
    module.event_flags = types.SimpleNamespace(BLOCKING_SYNC=1, DISABLE_TIMING=2)
    guarded = _translated(module)
    _add_pycuda_contexts(module, host, guarded)
    _add_pycuda_memory(module, host, guarded)
    _add_pycuda_streams(module, host, guarded)
    return module


def _add_pycuda_contexts(module, host, guarded):
    """`init` and `Device`, whose primary context is pushed and popped; `contexts` has those that were retained."""

    class Context:
        def __init__(self):
            self.held = []

        @guarded
        def push(self):
            opened = host.on_device()
            opened.__enter__()
            self.held.append(opened)

        def pop(self):
            self.held.pop().__exit__(None, None, None)

        def detach(self):
            host.closed = True

    module.contexts = []
    device = types.SimpleNamespace(
        retain_primary_context=lambda: module.contexts.append(Context()) or module.contexts[-1]
    )
    module.init = lambda: host.calls.append("init")
    module.Device = lambda number: device


def _add_pycuda_memory(module, host, guarded):
    """Memory of the device and of the host, and copies between them."""

    class DeviceAllocation:
        def __init__(self, size):
            self.address = host.allocate(size)

        def __int__(self):
            return self.address

        @guarded
        def free(self):
            host.free(self.address)

    class PagelockedHostAllocation(np.ndarray):
        @guarded
        def free(self):
            host.free_pinned(np.asarray(self))

    def pagelocked_empty(shape, dtype):
        return host.allocate_pinned(shape).view(PagelockedHostAllocation)[:].view(np.ndarray)

    module.mem_alloc = guarded(DeviceAllocation)
    module.pagelocked_empty = guarded(pagelocked_empty)
    module.memcpy_htod_async = guarded(lambda dest, src, stream=None: host.upload(dest, src, stream.handle))
    module.memcpy_dtoh_async = guarded(lambda dest, src, stream=None: host.download(dest, src, stream.handle))


def _add_pycuda_streams(module, host, guarded):
    """`Stream` and `Event`."""

    class Stream:
        def __init__(self, flags=0):
            assert flags == 1
            self.handle = host.open_stream()

        def __del__(self):
            host.close_stream(self.handle)

        @guarded
        def synchronize(self):
            host.synchronize(self.handle)

        @guarded
        def wait_for_event(self, event):
            host.stream_waits(self.handle, event.number)

    class Event:
        def __init__(self, flags=0):
            assert flags == 3
            self.number = host.open_event()

        def __del__(self):
            host.close_event(self.number)

        @guarded
        def record(self, stream=None):
            host.record(self.number, stream.handle)
            return self

        @guarded
        def synchronize(self):
            host.wait(self.number)
            return self

    module.Stream, module.Event = guarded(Stream), guarded(Event)


def _with_status(function):
    def call(*arguments):
        try:
            value = function(*arguments)
        except CudaMemoryError:
            return (cudaError_t.cudaErrorMemoryAllocation,)
        except BackendError:
            return (cudaError_t.cudaErrorIllegalAddress,)
        return (cudaError_t.cudaSuccess,) if value is None else (cudaError_t.cudaSuccess, value)

    return call


def _translated(module):
    """Decorator: errors of the host as those of pycuda."""

    def decorate(function):
        def call(*arguments, **named):
            try:
                return function(*arguments, **named)
            except BackendError as error:
                kind = module.MemoryError if isinstance(error, CudaMemoryError) else module.Error
                text = f"failed: {error.got}"
            # Outside of `except`, and without them: this traceback would keep streams alive, as pycuda's does not.
            arguments, named = (), {}
            raise kind(text)

        return call

    return decorate


def _number(handle):
    assert isinstance(handle, Handle), f"{handle!r} is no handle of cuda-bindings"
    return handle.number


def _memory(address, count):
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
