"""Q/DQ graphs that another program made."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exported import fp32_graph, graphs
from onnx import helper

from export.errors import ExportError
from export.foreign import REASON, foreign_int8
from export.graph import copy_of, insert_nodes, store

ENCODER = "test_resnet"


@pytest.fixture
def write(tmp_path):
    def written(model):
        onnx.save(model, tmp_path / "q.onnx")
        return tmp_path / "q.onnx"

    return written


def test_a_graph_that_keeps_the_contract_is_taken_with_its_maker_and_its_float_layers(write):
    model = copy_of(graphs(ENCODER)["int8"])
    model.producer_name, model.producer_version = "modelopt", "0.29"
    found = foreign_int8(write(model), fp32_graph(ENCODER))
    assert (found.precision, found.builder) == ("int8", "modelopt 0.29")
    assert found.content == write(model).read_bytes()
    kept = {n.name for n in model.graph.node if n.op_type == "Conv" and not n.input[0].endswith(".dq")}
    assert kept <= found.higher_precision_layers.keys()
    assert set(found.higher_precision_layers.values()) == {REASON}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.graph.output.pop(), "outputs logits"),
        (lambda m: m.graph.output[0].type.tensor_type.__setattr__("elem_type", onnx.TensorProto.FLOAT16), "elem type"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 224), r"\(224, 160\)"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(write, damage, message):
    model = copy_of(graphs(ENCODER)["int8"])
    damage(model)
    with pytest.raises(ExportError, match=message):
        foreign_int8(write(model), fp32_graph(ENCODER))


def test_a_graph_without_integers_is_refused(write):
    with pytest.raises(ExportError, match="without QuantizeLinear and DequantizeLinear"):
        foreign_int8(write(fp32_graph(ENCODER)), fp32_graph(ENCODER))


def test_a_pair_that_no_layer_computes_with_is_not_int8(write):
    model = copy_of(fp32_graph(ENCODER))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    store(model, "s", np.array(0.1, np.float32))
    pair = [
        helper.make_node("QuantizeLinear", [relu.input[0], "s"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["dq"], name="dq"),
    ]
    relu.input[0] = "dq"
    insert_nodes(model, pair)
    with pytest.raises(ExportError, match="no layer that reads both its inputs"):
        foreign_int8(write(model), fp32_graph(ENCODER))


def test_a_broken_contract_is_the_quantisers_business_and_not_the_encoders(write):
    model = copy_of(graphs(ENCODER)["int8"])
    model.opset_import[0].version = 21
    with pytest.raises(ExportError, match=r"--qdq-onnx .*opset.*quantise the bundle's model.fp32.onnx"):
        foreign_int8(write(model), fp32_graph(ENCODER))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "an empty graph"), (b"garbage" * 40, "no ONNX graph"), (None, "no such file")]
)
def test_a_file_that_is_no_graph_is_refused(tmp_path, content, message):
    path = tmp_path / "q.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        foreign_int8(path, fp32_graph(ENCODER))
