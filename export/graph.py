"""Small edits of an ONNX graph that keep it valid, sorted and the same bytes on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """Node that makes each tensor, by tensor name."""
    return {name: node for node in model.graph.node for name in node.output if name}


def consumers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Nodes that read each tensor, by tensor name, in graph order."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """Stored tensors by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def output_names(model: ModelProto) -> list[str]:
    """Names of the graph outputs in order."""
    return [value.name for value in model.graph.output]


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute of a node, or its default."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def set_attribute(node: NodeProto, name: str, value: int) -> None:
    """Replace an integer attribute of a node."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def copy_of(model: ModelProto) -> ModelProto:
    """An independent copy of the graph."""
    return ModelProto.FromString(model.SerializeToString())


def store(model: ModelProto, name: str, values: NDArray[np.generic]) -> str:
    """Add or replace an initializer; its name."""
    tensor = numpy_helper.from_array(np.asarray(values, order="C"), name)
    for index, present in enumerate(model.graph.initializer):
        if present.name == name:
            model.graph.initializer[index].CopyFrom(tensor)
            return name
    model.graph.initializer.append(tensor)
    return name


def redirect(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    """Let `nodes` read tensor `new` where they read `old`."""
    for node in nodes:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def insert_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Add nodes and put the graph back into topological order (stable, so the same bytes each time)."""
    model.graph.node.extend(nodes)
    sort_nodes(model)


def sort_nodes(model: ModelProto) -> None:
    """Order nodes so that each one comes after those it reads from; otherwise as they stand."""
    known = {value.name for value in model.graph.input} | set(initializers(model)) | {""}
    waiting, ordered = list(copy_of(model).graph.node), []
    while waiting:
        ready: list[NodeProto] = []
        blocked: list[NodeProto] = []
        for node in waiting:
            (ready if known.issuperset(node.input) else blocked).append(node)
            if ready and ready[-1] is node:
                known.update(node.output)
        if not ready:
            raise ValueError(f"graph has a cycle or an unknown input at node {blocked[0].name}")
        ordered.extend(ready)
        waiting = blocked
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def remove_unused(model: ModelProto) -> None:
    """Drop nodes and initializers that no output depends on."""
    needed = set(output_names(model))
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    whole = copy_of(model)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(n for n in whole.graph.node if needed.intersection(n.output))
    model.graph.initializer.extend(t for t in whole.graph.initializer if t.name in needed)


def float_tensors(model: ModelProto) -> dict[str, int]:
    """Number of elements of each float32 activation, by name; dimensions that vary count as 1."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    makers = producers(model)
    values = [v for v in (*inferred.graph.value_info, *inferred.graph.output) if v.name in makers]
    return {v.name: _elements(v) for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def _elements(value: onnx.ValueInfoProto) -> int:
    return int(np.prod([d.dim_value or 1 for d in value.type.tensor_type.shape.dim]))


def with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """A copy whose outputs are these float32 tensors instead of its own."""
    seen = copy_of(model)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    return seen


def strip_metadata(model: ModelProto) -> None:
    """Remove names, paths and stack traces of the machine that exported the graph."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    model.producer_version = model.producer_version.partition("+")[0]  # "+cu130" is the machine's, not the graph's
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def model_bytes(model: ModelProto) -> bytes:
    """The graph as it is written to disk; equal graphs give equal bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def model_sha256(model: ModelProto) -> str:
    """SHA-256 of `model_bytes`."""
    return hashlib.sha256(model_bytes(model)).hexdigest()
