"""Percentiles say what they can, the warm-up goes by time, and what does not fit is left out and listed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from bundle_fixtures import random_images
from PIL import Image

from export.latency import (
    FEWEST_CALLS,
    STAGES,
    Latency,
    LatencySweep,
    LeftOut,
    joined_sweeps,
    latency_of,
    measure_latency,
    time_calls,
)
from runtime import Detector
from runtime.backends import open_backend
from runtime.bundle import open_bundle


class Clock:
    """Time that passes only inside calls, each of which takes the next of the given seconds."""

    def __init__(self, *durations):
        self.durations, self.now, self.calls = list(durations), 0.0, 0

    def __call__(self):
        return self.now

    def call(self):
        self.now += self.durations[min(self.calls, len(self.durations) - 1)]
        self.calls += 1


def test_warm_up_takes_a_quarter_of_the_time_and_is_not_counted():
    clock = Clock(*[0.25] * 4, 0.125)
    times, last = time_calls(clock.call, seconds=4.0, clock=clock)
    assert times.tolist() == [0.125] * 24
    assert (clock.calls, last) == (4 + 24, 0.25)


def test_a_slow_first_call_says_nothing_of_those_that_follow():
    clock = Clock(9.0, 0.25)
    times, last = time_calls(clock.call, seconds=4.0, clock=clock)
    assert (times.tolist(), last) == ([0.25] * 12, 0.25)


def test_calls_that_do_not_fit_are_not_timed():
    clock = Clock(0.75)
    times, last = time_calls(clock.call, seconds=4.0, clock=clock)
    assert (len(times), last, clock.calls) == (0, 0.75, 2)


def test_calls_that_turn_slow_are_timed_often_enough_all_the_same():
    clock = Clock(0.25, 0.25, 2.0)
    times, _ = time_calls(clock.call, seconds=2.0, clock=clock)
    assert times.tolist() == [2.0] * FEWEST_CALLS


def test_figures_are_percentiles_of_the_calls():
    times = np.arange(1, 102) / 1000  # 1 to 101 ms
    latency = latency_of(times, precision="fp32", backend="b", stage="graph", batch=8)
    assert (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms) == pytest.approx((51, 91, 96, 100))
    assert latency.spread_ms == pytest.approx(25)
    assert latency.pictures_per_second == pytest.approx(8 / 0.051)
    assert latency.calls == 101


@pytest.mark.parametrize(
    ("calls", "known"), [(9, ()), (10, (90,)), (20, (90, 95)), (99, (90, 95)), (100, (90, 95, 99))]
)
def test_a_percentile_that_too_few_calls_cannot_show_is_none(calls, known):
    latency = latency_of(np.ones(calls), precision="fp32", backend="b", stage="graph", batch=1)
    assert tuple(p for p in (90, 95, 99) if getattr(latency, f"p{p}_ms") is not None) == known
    assert latency.p50_ms == 1000


def test_every_stage_of_a_bundle_is_timed_for_every_batch(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    artifact = bundle.manifest.onnx_artifact("fp32")
    backend = open_backend("onnxruntime", bundle.read(artifact), bundle.manifest, file=artifact.file, threads=1)
    images = random_images(4)
    files = [_png(image) for image in images]
    with Detector.load(tiny_bundle, backend="onnxruntime", precision="fp32", threads=1) as detector:
        sweep = measure_latency(backend, detector, images, files, precision="fp32", seconds=0.2, batches=(1, 2, 4))
    assert [(m.stage, m.batch) for m in sweep.measured] == [(stage, b) for stage in STAGES for b in (1, 2, 4)]
    assert sweep.left_out == ()
    assert {(m.precision, m.backend) for m in sweep.measured} == {("fp32", "onnxruntime")}
    assert all(m.calls >= FEWEST_CALLS and m.p50_ms > 0 and m.spread_ms >= 0 for m in sweep.measured)
    medians = {(m.stage, m.batch): m.p50_ms for m in sweep.measured}
    assert medians["end to end", 4] > medians["graph", 4]


def test_batches_that_do_not_fit_are_left_out_with_all_above_them(monkeypatch):
    given = []

    class Slow:
        name = "slow"

        def infer(self, images):
            given.append(len(images))

        def predict(self, files, batch_size):
            given.append(len(files))

    def fake_time_calls(call, *, seconds):
        call()
        return (np.ones(9), 1.0) if given[-1] < 4 else (np.empty(0), 1.0)

    monkeypatch.setattr("export.latency.time_calls", fake_time_calls)
    images = random_images(16)
    sweep = measure_latency(Slow(), Slow(), images, [b""] * 16, precision="int8", seconds=3, batches=(1, 2, 4, 8, 16))
    assert [(m.stage, m.batch) for m in sweep.measured] == [(stage, b) for stage in STAGES for b in (1, 2)]
    assert [(left.stage, left.batch) for left in sweep.left_out] == [(s, b) for s in STAGES for b in (4, 8, 16)]
    assert given == [1, 2, 4] * 3
    assert {left.reason for left in sweep.left_out} == {"5 calls of 1 s at batch 4 do not fit into 3 s"}


def test_sweeps_are_joined_in_order():
    one = LatencySweep((Latency("fp32", "b", "graph", 1, 9, 1, 1, 1, 1, 1, 1),), ())
    two = LatencySweep((), (LeftOut("int8", "b", "graph", 1, "slow"),))
    assert joined_sweeps([one, two]) == LatencySweep(one.measured, two.left_out)


def _png(rgb):
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()
