"""Stand-ins for the runtime half of `tensorrt` 10 and 11 and of `tensorrt_rtx`, which compute on a `HostCuda`.

They take what the real ones take, and what would be undefined there is a fault: a context used by two threads at once,
or changed while a graph that was captured from it is still there.
"""

from __future__ import annotations

import enum
import threading
import time
import types

import numpy as np
from bundle_fixtures import EMBEDDING_DIM, PATCH, SIZE, numpy_outputs
from cuda_host import POISON, Work

from runtime.manifest import INPUT_NAME, OUTPUTS

CELLS = SIZE // PATCH
SHAPES = {
    INPUT_NAME: (SIZE, SIZE, 3),
    "logits": (),
    "trace_similarity": (),
    "embeddings": (EMBEDDING_DIM,),
    "evidence": (CELLS, CELLS),
}
SCRATCH_BYTES = 4096
VERSIONS = {("trt", 10): "10.13.3.9", ("trt", 11): "11.4.1.2", ("rtx", 1): "1.7.1.116"}

TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "UINT8"])
Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class HostTensorRT:
    """Makes the module and remembers what was made of it; `refuse` names calls that fail once."""

    def __init__(self, cuda, *, flavour="trt", major=10, profile=(1, 4, 16)):
        self.cuda, self.flavour, self.profile = cuda, flavour, profile
        self.contexts, self.refuse, self.logger = [], set(), None
        module = types.ModuleType({"trt": "tensorrt", "rtx": "tensorrt_rtx"}[flavour])
        module.__version__ = VERSIONS[flavour, major]
        module.TensorIOMode, module.DataType, module.Severity = TensorIOMode, DataType, Severity
        module.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        module.Runtime = lambda logger: Runtime(self, logger)
        if flavour == "trt":
            module.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
        else:
            module.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
        self.module = module

    def refused(self, name, message):
        if name not in self.refuse:
            return False
        self.refuse.remove(name)
        self.logger.log(Severity.ERROR, message)
        return True


class Runtime:
    """Makes an engine of every content but `b"damaged"`."""

    engine_host_code_allowed = False

    def __init__(self, host, logger):
        self.host = host
        host.logger = logger

    def deserialize_cuda_engine(self, content):
        return None if content == b"damaged" else Engine(self.host)


class Engine:
    """Of the tiny graph of bundle_fixtures."""

    num_io_tensors = len(SHAPES)

    def __init__(self, host):
        self.host = host
        if host.flavour == "trt":
            self.device_memory_size_v2 = SCRATCH_BYTES

    def get_tensor_name(self, index):
        return list(SHAPES)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == INPUT_NAME else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.UINT8 if name == INPUT_NAME else DataType.FLOAT

    def get_tensor_shape(self, name):
        return (-1, *SHAPES[name])

    def get_tensor_profile_shape(self, name, index):
        return [(batch, *SHAPES[name]) for batch in self.host.profile]

    def create_runtime_config(self):
        if self.host.flavour != "rtx":
            raise AttributeError("create_runtime_config")
        return types.SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, how):
        if self.host.refused("create_execution_context", "out of memory for a context"):
            return None
        context = Context(self.host, how)
        self.host.contexts.append(context)
        return context


class Context:
    """An execution context that computes the tiny graph in NumPy."""

    def __init__(self, host, how):
        self.host, self.how = host, how
        self.shape, self.addresses = None, {}
        self.needs_scratch = getattr(how, "name", "") == "USER_MANAGED"
        self.scratch = None
        self.captured = False
        self.flushed_shape = None
        self._user = None

    def set_device_memory(self, address, size):
        self.host.cuda.bytes_at(address, size)
        if size < SCRATCH_BYTES:
            self.host.cuda.fault("too little memory for an execution context")
        self.scratch = address

    def set_input_shape(self, name, shape):
        self._change()
        smallest, _, largest = self.host.profile
        if name != INPUT_NAME or shape[1:] != SHAPES[INPUT_NAME] or not smallest <= shape[0] <= largest:
            return False
        self.shape = shape
        return not self.host.refused("set_input_shape", "a shape that does not fit")

    def set_tensor_address(self, name, address):
        self._change()
        self.addresses[name] = address
        return name in SHAPES

    def execute_async_v3(self, stream):
        cuda = self.host.cuda
        if self._user != threading.get_ident():
            cuda.fault("an execution context was bound by one thread and run by another")
        self._user = None
        time.sleep(0)  # lets another thread in, where nothing keeps it out
        if self._user is not None:
            cuda.fault("an execution context was used by two threads at once")
        self._user = threading.get_ident()
        capturing = cuda.streams[stream].capture is not None
        name = "capture" if capturing else "execute_async_v3"
        if self.host.refused(name, "Error Code 1: Cuda Runtime (invalid argument)"):
            return False
        if capturing:
            self._check_capture()
        self.flushed_shape = self.shape
        cuda.give(stream, self._work(self.shape[0], dict(self.addresses)))
        return True

    def _check_capture(self):
        if self.flushed_shape != self.shape:
            self.host.cuda.fault("a capture before the first run of a shape")
        self.captured = True

    def _change(self):
        if self.captured:
            self.host.cuda.fault("an execution context was changed after a graph was captured from it")
        self._user = threading.get_ident()

    def _work(self, pictures, addresses):
        cuda, scratch = self.host.cuda, self.scratch
        if self.needs_scratch and scratch is None:
            cuda.fault("an execution context without memory")

        def compute():
            if scratch is not None:
                cuda.bytes_at(scratch, SCRATCH_BYTES)[:] = POISON
            size = pictures * int(np.prod(SHAPES[INPUT_NAME]))
            images = cuda.bytes_at(addresses[INPUT_NAME], size).reshape(pictures, *SHAPES[INPUT_NAME])
            outputs = numpy_outputs(images)
            for name in OUTPUTS:
                values = np.ascontiguousarray(outputs[name], np.float32)
                cuda.bytes_at(addresses[name], values.nbytes)[:] = values.view(np.uint8).reshape(-1)

        touches = (*addresses.values(), *([] if scratch is None else [scratch]))
        return Work("compute", touches, compute)
