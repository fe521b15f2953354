"""The model that is timed: EfficientNet-lite0 with its ImageNet weights and heads trained for seconds.

Speed does not depend on what the heads have learnt; they are trained only because a bundle carries thresholds, and
thresholds need scores that rise from real to fake.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.pictures import write_pictures
from train.config import DecisionConfig, RunConfig, Stage1Config, Stage2Config, preset_config
from train.run import train


def quick_config(data: Path) -> RunConfig:
    """The demo's networks, with the heads alone trained on a few pictures."""
    return replace(
        preset_config("demo"),
        data=str(data),
        decision=DecisionConfig(real_flagged_rate=0.1, fake_missed_rate=0.1),
        stage1=Stage1Config(epochs=1, batch_size=8, lr=0.01, train_encoder=False),
        stage2=Stage2Config(epochs=4, batch_size=8, lr=0.1),
        device="cpu",
    )


def quick_run(folder: Path) -> Path:
    """A finished run folder, in seconds."""
    run = folder / "run"
    run.mkdir(parents=True)
    data = write_pictures(folder / "data", counts={"train": 8, "val": 12}, side=256)
    train(quick_config(data), run)
    return run
