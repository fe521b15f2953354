"""A vision transformer through export: one reader of the input, named layers, a residual stream in floating point."""

from __future__ import annotations

import pytest
import torch
from exported import batches, images, quantizer_of, run_graph

from export.graph import consumers, float_tensors
from export.int8 import operations
from export.onnx_export import check_contract, onnx_from_model
from export.precision import fp16_from_fp32, fp32_layers
from export.ranges import largest_magnitudes
from runtime.manifest import INPUT_NAME
from train.encoder import Encoder
from train.model import NTFDetector


@pytest.fixture(scope="module")
def fp32():
    torch.manual_seed(0)
    made = NTFDetector(Encoder("test_vit"), 128, "projection").eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # the exporter stores equal ones once, under the name of the first
            torch.nn.init.normal_(parameter, std=0.01)
    return onnx_from_model(made)


@pytest.fixture(scope="module")
def largest(fp32):
    return largest_magnitudes(fp32, float_tensors(fp32), batches)


def test_the_size_of_the_batch_is_not_read_from_the_input(fp32):
    assert [node.op_type for node in consumers(fp32)[INPUT_NAME]] == ["Cast"]
    assert any(node.op_type == "Shape" for node in fp32.graph.node)
    alone, together = (run_graph(fp32, images()[:count])["logits"] for count in (1, 4))
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    assert together.shape == (4,)


def test_products_have_the_names_of_their_layers(fp32):
    names = {node.name for node in fp32.graph.node if node.op_type in ("MatMul", "Gemm")}
    assert {"encoder.net.blocks.0.attn.qkv", "encoder.net.blocks.5.mlp.fc2"} <= names


def test_fp16_keeps_only_pixels_and_scores_wide(fp32, largest):
    kept = fp32_layers(fp32, largest)
    assert not any(name.startswith("encoder.net.blocks") for name in kept)
    half = fp16_from_fp32(fp32, kept)
    check_contract(half, input_size=(160, 160))
    rows = run_graph(half, images())["embeddings"] * run_graph(fp32, images())["embeddings"]
    assert rows.sum(1).min() > 0.999


def test_int8_quantises_the_products_with_weights_and_not_the_residual_stream(fp32, largest):
    made = quantizer_of(fp32, largest)
    work = operations(fp32)
    assert made.plan.shortcuts == ()
    assert sum(work[name] for name in made.plan.layers) > 0.8 * sum(work.values())
    graph = made.graph(made.plan)
    check_contract(graph, input_size=(160, 160))
    rows = run_graph(graph, images())["embeddings"] * run_graph(fp32, images())["embeddings"]
    assert 0.99 < rows.sum(1).min() < 1  # measured: 0.999
