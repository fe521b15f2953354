"""The model that the benchmarks share: trained and exported once for a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.model import quick_run
from export.trt import Options, export_run
from runtime.bundle import Bundle
from train.checkpoint import load_detector
from train.model import NTFDetector


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
