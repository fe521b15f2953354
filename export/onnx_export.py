"""PyTorch detector -> FP32 ONNX graph that keeps the contract: uint8 pictures in, four float32 outputs out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from export.errors import ExportError
from export.graph import (
    attribute,
    consumers,
    initializers,
    output_names,
    redirect,
    remove_unused,
    set_attribute,
    sort_nodes,
    store,
    strip_metadata,
)
from export.session import open_session
from runtime.manifest import INPUT_NAME, OUTPUTS
from train.model import NTFDetector

# float16 scales of QuantizeLinear need opset 19; TensorRT 10.9 reads up to 20 without reservations.
OPSET = 20
LARGEST_BATCH = 4096
# Measured on lite0 and ResNet-50: 2e-6. Anything above this is a different computation, not rounding.
PARITY_LIMIT = 1e-3


def onnx_from_model(detector: NTFDetector) -> ModelProto:
    """FP32 graph of a detector, checked: contract, folded batch norms, and the same outputs as PyTorch.

    Args:
        detector: in evaluation mode; it is not changed.

    Raises:
        ExportError: the detector is in training mode, or the graph breaks the contract or differs from PyTorch.

    Note:
        Equal weights give equal bytes. Takes about 20 s for EfficientNet-lite0 on two cores.
    """
    if detector.training:
        raise ExportError(
            "detector",
            got="a model in training mode",
            wanted="evaluation mode, where batch norm uses its stored statistics",
            remedy="call .eval() first",
        )
    model = _trace(_with_plain_pooling(detector), detector.input_size)
    _drop_broadcast_expands(model)
    _read_input_once(model)
    _store_weights_transposed(model)
    remove_unused(model)
    _name_nodes_by_weight(model)
    strip_metadata(model)
    check_contract(model, input_size=detector.input_size)
    check_parity(model, detector)
    return model


def check_contract(model: ModelProto, *, input_size: tuple[int, int]) -> None:
    """Refuse a graph that breaks the contract every back-end relies on.

    Raises:
        ExportError: naming the first broken rule.
    """
    onnx.checker.check_model(model, full_check=True)
    first = consumers(model).get(INPUT_NAME, [])
    found = {
        "opset": max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) <= OPSET,
        "only standard operators": all(n.domain in ("", "ai.onnx") for n in model.graph.node),
        "input images uint8 (N, H, W, 3)": _inputs(model) == [(INPUT_NAME, TensorProto.UINT8, [0, *input_size, 3])],
        "Cast as the only reader of the input": [n.op_type for n in first] == ["Cast"],
        "outputs " + ", ".join(OUTPUTS): output_names(model) == list(OUTPUTS),
        "float32 outputs": all(o.type.tensor_type.elem_type == TensorProto.FLOAT for o in model.graph.output),
        "batch norms folded": all(n.op_type != "BatchNormalization" for n in model.graph.node),
    }
    broken = [rule for rule, kept in found.items() if not kept]
    if broken:
        raise ExportError(
            "ONNX graph",
            got=f"a graph that breaks the rule '{broken[0]}'",
            wanted="the contract that runtime and TensorRT rely on",
            remedy="this encoder needs work in export/onnx_export.py; choose another encoder meanwhile",
        )


def input_size(model: ModelProto) -> tuple[int, int]:
    """Height and width of the pictures that a graph takes, as it states them; 0 where it does not."""
    sides = [d.dim_value for value in model.graph.input[:1] for d in value.type.tensor_type.shape.dim[1:3]]
    height, width = sides if len(sides) == 2 else (0, 0)
    return height, width


def check_parity(model: ModelProto, detector: NTFDetector, *, pictures: int = 3, seed: int = 0) -> float:
    """Largest difference between graph and PyTorch over all outputs, on random pictures.

    Differences of an output are divided by its largest value where that is above 1.

    Raises:
        ExportError: the difference is above PARITY_LIMIT.
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (pictures, *detector.input_size, 3), dtype=np.uint8)
    difference = 0.0
    # Also one picture alone: a batch size baked into the graph shows here.
    for batch in (images, images[:1]):
        for ours, theirs in zip(_run(model, batch), torch_outputs(detector, batch), strict=True):
            if ours.shape != theirs.shape:
                raise _parity_error(f"an output of shape {ours.shape}", f"shape {theirs.shape}")
            difference = max(difference, float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())))
    if not difference <= PARITY_LIMIT:
        raise _parity_error(f"outputs that differ by {difference:.3g}", f"at most {PARITY_LIMIT:g}")
    return difference


def torch_outputs(detector: NTFDetector, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The four outputs of the PyTorch detector for raw pictures (N, H, W, 3), in contract order."""
    with torch.inference_mode():
        outputs = detector(torch.from_numpy(images))
    return [np.asarray(getattr(outputs, name).float().numpy()) for name in OUTPUTS]


def _parity_error(got: str, wanted: str) -> ExportError:
    return ExportError(
        "ONNX graph against PyTorch",
        got=got,
        wanted=wanted,
        remedy="the exporter changed the computation; try another torch version",
    )


class _MeanPool(nn.Module):
    """Mean over the map: AdaptiveAvgPool2d(1) is exported as a strided gather, which TensorRT cannot fuse."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3), keepdim=True)


def _with_plain_pooling(detector: NTFDetector) -> NTFDetector:
    plain = copy.deepcopy(detector)
    pools = [
        n for n, m in plain.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1))
    ]
    for name in pools:
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, _MeanPool())
    return plain


def _trace(detector: NTFDetector, input_size: tuple[int, int]) -> ModelProto:
    example = torch.zeros((2, *input_size, 3), dtype=torch.uint8)
    batch = torch.export.Dim("N", min=1, max=LARGEST_BATCH)
    with warnings.catch_warnings():
        # Deprecations inside torch.onnx and onnxscript, about their own calls and not ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            detector,
            (example,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            dynamic_shapes={INPUT_NAME: {0: batch}},
            verbose=False,
        )
    assert program is not None
    # Through bytes: the exporter's own object maps the weights and must not be edited.
    return ModelProto.FromString(program.model_proto.SerializeToString())


def _drop_broadcast_expands(model: ModelProto) -> None:
    """Remove Expand in front of Div: division broadcasts, and Expand would make the graph read the input's shape."""
    readers = consumers(model)
    for node in model.graph.node:
        if node.op_type == "Expand" and all(r.op_type == "Div" for r in readers[node.output[0]]):
            redirect(readers[node.output[0]], node.output[0], node.input[0])


def _read_input_once(model: ModelProto) -> None:
    """Let Shape read the batch size from what Cast makes of the input: TensorRT wants Cast to be the only reader."""
    readers = consumers(model)[INPUT_NAME]
    casts = [node for node in readers if node.op_type == "Cast"]
    redirect([node for node in readers if node.op_type == "Shape"], INPUT_NAME, casts[0].output[0])
    sort_nodes(model)


def _store_weights_transposed(model: ModelProto) -> None:
    """Fold Transpose(weight) into the weight, also for the Gemm that shares it, so that it is stored once."""
    readers, tensors = consumers(model), initializers(model)
    for node in list(model.graph.node):
        weight = tensors.get(node.input[0]) if node.op_type == "Transpose" else None
        if weight is None or len(weight.dims) != 2:
            continue
        sharers = [r for r in readers[weight.name] if r is not node]
        if any(r.op_type != "Gemm" or r.input[1] != weight.name or not attribute(r, "transB", 0) for r in sharers):
            continue
        store(model, weight.name, numpy_helper.to_array(weight).T)
        for sharer in sharers:
            set_attribute(sharer, "transB", 0)
        redirect(readers[node.output[0]], node.output[0], weight.name)


def _name_nodes_by_weight(model: ModelProto) -> None:
    """Name each node after the layer whose weight it reads, otherwise after its operator and place."""
    used: dict[str, int] = {}
    readers = consumers(model)
    for node in model.graph.node:
        layer = _layer_name(node, readers)
        name = layer or node.op_type
        count = used[name] = used.get(name, 0) + 1
        node.name = name if layer and count == 1 else f"{name}_{count}"


def _layer_name(node: NodeProto, readers: Mapping[str, list[NodeProto]]) -> str | None:
    """Name of the layer that a node is: by its weight, or by the bias that is added to a product with a folded one."""
    after = readers.get(node.output[0], []) if node.op_type == "MatMul" else []
    named = [*node.input[1:2], *(name for reader in after[:1] if reader.op_type == "Add" for name in reader.input)]
    found = (name.rpartition(".")[0] for name in named if name.endswith((".weight", ".bias")))
    return next(found, None)


def _inputs(model: ModelProto) -> list[tuple[str, int, list[int]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in model.graph.input
    ]


def _run(model: ModelProto, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    return [np.asarray(o) for o in open_session(model).run(list(OUTPUTS), {INPUT_NAME: images})]
