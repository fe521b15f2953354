"""The bare model on every back-end and precision that runs here, against eager PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.pictures import photograph
from runtime.backends import GRAPH_BACKENDS, open_backend, probe_backend
from runtime.manifest import PRECISIONS

# Largest logit difference to PyTorch as a share of the spread of PyTorch's logits over these pictures. The parity
# of a bundle is judged by export.verify on labelled pictures; this only makes sure that the right thing is timed.
SHARE_OF_SPREAD = {"fp32": 0.01, "fp16": 0.1, "int8": 1.0}
BATCHES = (1, 8, 64)
CONTENDERS = ["PyTorch eager", *(f"{backend} {precision}" for backend in GRAPH_BACKENDS for precision in PRECISIONS)]


@pytest.fixture(scope="session")
def images():
    return np.stack([photograph(224, 224, seed=seed) for seed in range(max(BATCHES))])


@pytest.fixture(scope="session")
def expected(timed_model, images):
    with torch.inference_mode():
        return timed_model.detector(torch.from_numpy(images)).logits.numpy()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_backend(benchmark, timed_model, images, expected, contender, batch):
    infer = _pytorch(timed_model) if contender == "PyTorch eager" else _backend(timed_model, contender)
    given = images[:batch]
    difference = float(np.abs(infer(given) - expected[:batch]).max())
    precision = contender.rpartition(" ")[2] if contender != "PyTorch eager" else "fp32"
    assert difference <= SHARE_OF_SPREAD[precision] * float(np.ptp(expected))
    benchmark.group = f"model, batch {batch}"
    benchmark.name = contender
    benchmark.extra_info["baseline"] = contender == "PyTorch eager"
    benchmark(infer, given)


def _pytorch(timed_model):
    @torch.inference_mode()
    def infer(given):
        return timed_model.detector(torch.from_numpy(given)).logits.numpy()

    return infer


def _backend(timed_model, contender):
    name, _, precision = contender.rpartition(" ")
    probe = probe_backend(name)
    if not probe.runs:
        pytest.skip(f"{name} does not run here: {probe.reason}")
    bundle = timed_model.bundle
    artifact = bundle.manifest.onnx_artifact(precision)
    backend = open_backend(name, bundle.read(artifact), bundle.manifest, file=artifact.file)
    return lambda given: backend.infer(given).logits
