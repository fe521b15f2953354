"""A detector that reads high-frequency residuals keeps the contract and its scores at every precision."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from exported import batches, detector, images, quantizer_of, run_graph
from torch import nn

from export.graph import float_tensors
from export.onnx_export import check_contract, onnx_from_model, torch_outputs
from export.precision import fp16_from_fp32, fp32_layers
from export.ranges import largest_magnitudes
from train.encoder import Encoder
from train.encoder_weights import load_exactly
from train.model import NTFDetector


@functools.cache
def reading(reads):
    """An untrained detector of residuals, or of both, on the network of `detector("test_resnet")`."""
    torch.manual_seed(0)
    made = NTFDetector(Encoder("test_resnet", depths=(1,), reads=reads), 128, "both").eval()
    load_exactly(made.encoder.net, detector("test_resnet").encoder.net.state_dict(), source="detector")
    made.mean_trace.normal_(generator=torch.Generator().manual_seed(1))
    return made


@functools.cache
def graphs(reads):
    fp32 = onnx_from_model(reading(reads))
    largest = largest_magnitudes(fp32, float_tensors(fp32), batches)
    made = quantizer_of(fp32, largest)
    return {"fp32": fp32, "fp16": fp16_from_fp32(fp32, fp32_layers(fp32, largest)), "int8": made.graph(made.plan)}


@pytest.mark.parametrize("reads", ["residual", "both"])
def test_filter_is_in_the_graph_and_the_network_is_there_once(reads):
    model = graphs(reads)["fp32"]
    assert [node.op_type for node in model.graph.node].count("AveragePool") >= 1
    convolutions = sum(isinstance(module, nn.Conv2d) for module in reading(reads).encoder.modules())
    assert [node.op_type for node in model.graph.node].count("Conv") == convolutions


# Measured on unit rows: 1e-7, 1e-4 and 5e-3.
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("reads", ["residual", "both"])
def test_graph_gives_what_pytorch_gives(reads, precision, atol):
    model = graphs(reads)[precision]
    check_contract(model, input_size=(160, 160))
    theirs = torch_outputs(reading(reads), images())
    ours = run_graph(model, images())
    print(reads, precision, "rows differ by", np.abs(ours["embeddings"] - theirs[2]).max())
    np.testing.assert_allclose(ours["embeddings"], theirs[2], atol=atol)
    np.testing.assert_allclose(ours["trace_similarity"], theirs[1], atol=atol)
    assert run_graph(model, images()[:1])["embeddings"][0] == pytest.approx(ours["embeddings"][0], abs=1e-3)
