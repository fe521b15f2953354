"""An ONNX graph in ONNX Runtime, for looking inside; scoring goes through `runtime.backends`."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto

from export.graph import model_bytes


def open_session(model: ModelProto, *, optimize: bool = True) -> Any:
    """ONNX Runtime session of a graph on the CPU.

    Args:
        model: any valid graph.
        optimize: let ONNX Runtime fuse and fold nodes; without it the graph is computed node by node.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
