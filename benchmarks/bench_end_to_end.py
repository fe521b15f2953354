"""JPEG bytes to verdict: the runtime against Pillow, torchvision and eager PyTorch with the same model."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pictures import jpeg_bytes, photograph
from benchmarks.torch_scoring import REFERENCE, torch_logits
from runtime import Detector
from runtime.backends import GRAPH_BACKENDS, probe_backend

WORKLOADS = {"one 12 MP JPEG": (1, 3000, 4000), "32 JPEGs of 256 px": (32, 256, 256)}
CONTENDERS = [REFERENCE, *(f"{backend} {precision}" for backend in GRAPH_BACKENDS for precision in ("fp32", "int8"))]
# INT8 may move a probability that is near the middle; export.verify judges that on labelled pictures.
TOLERANCE = {"fp32": 0.01, "int8": 0.5}


@pytest.fixture(scope="session", params=WORKLOADS)
def workload(request):
    count, height, width = WORKLOADS[request.param]
    return request.param, [jpeg_bytes(photograph(height, width, seed=seed)) for seed in range(count)]


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_end_to_end(benchmark, timed_model, workload, contender):
    name, files = workload
    score = _with_pytorch(timed_model)
    expected = score(files)
    if contender != REFERENCE:
        score = _with_runtime(timed_model, contender)
        tolerance = TOLERANCE[contender.rpartition(" ")[2]]
        np.testing.assert_allclose(score(files), expected, rtol=0, atol=tolerance)
    benchmark.group = name
    benchmark.name = contender
    benchmark.extra_info["baseline"] = contender == REFERENCE
    benchmark(score, files)


def _with_pytorch(timed_model):
    calibration = timed_model.bundle.manifest.calibration["fp32"]
    return lambda files: calibration.fake_probability(torch_logits(timed_model.detector, files, size=224))


def _with_runtime(timed_model, contender):
    name, _, precision = contender.rpartition(" ")
    probe = probe_backend(name)
    if not probe.runs:
        pytest.skip(f"{name} does not run here: {probe.reason}")
    detector = Detector.load(timed_model.folder, backend=name, precision=precision)
    return lambda files: np.array([d.fake_probability for d in detector.predict(files, batch_size=32)])
