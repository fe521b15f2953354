"""Stand-ins for `tensorrt` 10 and 11, with the names that each version has and no others.

Neither can be installed without NVIDIA's index. A build checks what the real one insists on, goes through its phases,
and gives bytes that tell how it was configured.
"""

from __future__ import annotations

import enum
import json
import types

OUTPUTS = ("logits", "trace_similarity", "embeddings", "evidence")
# As `tensorrt` 10 prints it with detailed profiling.
PLAN = (
    "Layers:\n"
    "Name: Reformatting CopyNode for Input Tensor 0 to conv1, LayerType: Reformat, Inputs: [ { Name: images, "
    "Location: Device, Dimensions: [-1,16,16,3], Format/Datatype: UInt8 }], Outputs: [ { Name: half, Location: "
    "Device, Dimensions: [-1,3,16,16], Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], "
    "ParameterType: Reformat, Origin: CAST, TacticValue: 0x0, StreamId: 0, Metadata: \n"
    "Name: conv1 + Relu_1, LayerType: CaskConvolution, Inputs: [ { Name: half, Location: Device, Dimensions: "
    "[-1,3,16,16], Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], Outputs: [ { Name: relu, "
    "Location: Device, Dimensions: [-1,8,4,4], Format/Datatype: Half }], ParameterType: Convolution, Kernel: [4,4], "
    "TacticName: sm80, TacticValue: 0x1, StreamId: 0, Metadata: [ONNX Layer: conv1]\x1e[ONNX Layer: Relu_1]\n"
)


class Severity(enum.Enum):
    """Of a log message."""

    ERROR = 1
    WARNING = 2
    VERBOSE = 4


class ILogger:
    """Base of loggers."""

    def __init__(self):
        self.started = True


class IProgressMonitor:
    """Base of progress monitors."""

    def __init__(self):
        self.started = True


class Tensor:
    """An input or output of a network."""

    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Network:
    """Empty until a parser fills it."""

    def __init__(self, strongly_typed):
        self.strongly_typed = strongly_typed
        self.inputs, self.outputs, self.num_layers = [], [], 0

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]


class Parser:
    """Takes every content for a graph that keeps the contract."""

    num_errors = 0

    def __init__(self, network, log):
        self.network = network

    def parse(self, content):
        self.network.inputs = [Tensor("images", (-1, 16, 16, 3))]
        self.network.outputs = [Tensor(name, (-1,)) for name in OUTPUTS]
        self.network.num_layers = 2
        return True


class Profile:
    """An optimization profile."""

    def set_shape(self, name, smallest, best, largest):
        self.batches = [smallest[0], best[0], largest[0]]


class TimingCache:
    """Kernel times; a damaged one is refused by the configuration."""

    def __init__(self, content):
        self.content = content

    def serialize(self):
        return bytearray(self.content + b"+timed")


class Config:
    """What a build is told. Nothing can be set that the real one does not have."""

    __slots__ = ("flags", "hardware_compatibility_level", "pools", "profile", "profiling_verbosity", "progress_monitor",
                 "timing_cache")  # fmt: skip

    def __init__(self):
        self.flags, self.pools, self.profile, self.timing_cache = ["TF32"], {}, None, None
        self.hardware_compatibility_level = None

    def set_flag(self, flag):
        self.flags.append(flag.name)

    def clear_flag(self, flag):
        self.flags.remove(flag.name)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile):
        self.profile = profile
        return 0

    def create_timing_cache(self, content):
        return TimingCache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.timing_cache = cache
        return ignore_mismatch or not cache.content.startswith(b"damaged")

    def get_timing_cache(self):
        return self.timing_cache


def fake_tensorrt(major):
    """The module `tensorrt` of a major version, 10 or 11."""
    trt = types.ModuleType("tensorrt")
    trt.__version__ = {10: "10.13.3.9", 11: "11.4.1.2"}[major]
    trt.ILogger, trt.IProgressMonitor, trt.OnnxParser = ILogger, IProgressMonitor, Parser
    creation = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if major == 10 else {}
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", creation)
    precisions = ["FP16", "INT8"] if major == 10 else []
    trt.BuilderFlag = enum.Enum("BuilderFlag", [*precisions, "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN"])
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])

    class Builder:
        def __init__(self, log):
            self.log = log

        def create_network(self, flags):
            return Network(strongly_typed=major == 11 or bool(flags & 2))

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            if not network.strongly_typed:
                self.log.log(Severity.ERROR, "a weakly typed network takes no types from its graph")
                return None
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            wanted = all(monitor.step_complete("Building", step) for step in range(2))
            monitor.phase_finish("Building")
            if not wanted:
                self.log.log(Severity.ERROR, "Build canceled by user")
                return None
            if config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED:
                self.log.log(Severity.VERBOSE, PLAN)
            level = config.hardware_compatibility_level
            told = {"flags": config.flags, "pools": config.pools, "batches": config.profile.batches,
                    "level": level and level.name}  # fmt: skip
            return bytearray(json.dumps(told).encode())

    trt.Builder = Builder
    return trt
