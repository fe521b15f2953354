"""A detector with standardised embeddings keeps the contract and its scores at every precision."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from exported import batches, detector, images, quantizer_of, run_graph

from export.graph import float_tensors, initializers
from export.onnx_export import check_contract, onnx_from_model, torch_outputs
from export.precision import fp16_from_fp32, fp32_layers
from export.ranges import largest_magnitudes
from train.encoder import with_standardizer


@functools.cache
def standardized():
    """`detector("test_resnet")` whose heads read standardised embeddings."""
    made = copy.deepcopy(detector("test_resnet"))
    with torch.inference_mode():
        rows = made.pool(torch.from_numpy(images()))
    with_standardizer(made.encoder, enabled=True).standardizer.fit(rows.mean(0), rows.std(0, correction=0))
    return made.eval()


@functools.cache
def graphs():
    fp32 = onnx_from_model(standardized())
    largest = largest_magnitudes(fp32, float_tensors(fp32), batches)
    made = quantizer_of(fp32, largest)
    int8 = made.graph(made.plan)
    return {"fp32": fp32, "fp16": fp16_from_fp32(fp32, fp32_layers(fp32, largest)), "int8": int8}


def test_mean_and_scale_are_in_the_graph():
    assert {"encoder.standardizer.mean", "encoder.standardizer.scale"} <= initializers(graphs()["fp32"]).keys()
    plain = torch_outputs(detector("test_resnet"), images())
    assert np.abs(plain[2] - torch_outputs(standardized(), images())[2]).max() > 0.1


# Measured on unit rows: 1e-6, 6e-3 and 6e-2; most of it where a dimension that hardly moves is scaled up.
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("fp16", 2e-2), ("int8", 0.15)])
def test_graph_gives_what_pytorch_gives(precision, atol):
    model = graphs()[precision]
    check_contract(model, input_size=(160, 160))
    theirs = torch_outputs(standardized(), images())
    ours = run_graph(model, images())
    print(precision, "rows differ by", np.abs(ours["embeddings"] - theirs[2]).max())
    np.testing.assert_allclose(ours["embeddings"], theirs[2], atol=atol)
    np.testing.assert_allclose(ours["trace_similarity"], theirs[1], atol=atol)
