"""The options of the benchmarks, and the model that they share: trained and exported once for a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.loss_contenders import LossBenchmarkError, precisions_of
from benchmarks.model import quick_run
from export.trt import Options, export_run
from runtime.bundle import Bundle
from train.checkpoint import load_detector
from train.model import NTFDetector


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of bench_loss.py; the other benchmarks run on the CPU."""
    parser.addoption("--device", default="cpu", help="bench_loss.py: time the loss on cpu or cuda")
    parser.addoption("--max-rows", type=int, default=65536, help="bench_loss.py: leave out batches with more rows")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there before anything is collected."""
    try:
        precisions_of(config.getoption("--device", "cpu"))
    except LossBenchmarkError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device", "cpu")


@dataclass(frozen=True)
class TimedModel:
    """One model in both worlds.

    Attributes:
        detector: the PyTorch model, in eval mode.
        folder: its bundle.
        bundle: the same, opened.
    """

    detector: NTFDetector
    folder: Path
    bundle: Bundle


@pytest.fixture(scope="session")
def timed_model(tmp_path_factory) -> TimedModel:
    folder = tmp_path_factory.mktemp("benchmarks")
    run = quick_run(folder)
    bundle = export_run(Options(run=run, model=folder / "bundle", engine=False))
    return TimedModel(load_detector(run), folder / "bundle", bundle)
