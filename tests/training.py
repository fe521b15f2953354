"""A data set and a configuration small enough to train in a second, for tests of training, export and reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

# The benchmarks train on the same pictures, and import nothing of the tests.
from benchmarks.pictures import GENERATOR as GENERATOR
from benchmarks.pictures import write_pictures as write_pictures
from train.config import (
    AugmentConfig,
    DecisionConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    preset_config,
)
from train.loop import StageLoop

TINY_ENCODER = "test_resnet"  # timm's own test model: 160 px, 0.4 M parameters, residual connections


def tiny_config(data: Path, *, encoder: str = TINY_ENCODER, **changes: object) -> RunConfig:
    """Two short epochs of each stage on random weights; rates that a few validation pictures can resolve."""
    config = replace(
        preset_config("demo"),
        data=str(data),
        model=ModelConfig(encoder=encoder, encoder_weights="none", embedding_dim=128),
        loss=LossConfig(),
        augment=AugmentConfig(),
        decision=DecisionConfig(real_flagged_rate=0.1, fake_missed_rate=0.1),
        stage1=Stage1Config(epochs=2, batch_size=4, lr=0.01),
        stage2=Stage2Config(epochs=2, batch_size=6, lr=0.5),
        device="cpu",
    )
    return replace(config, **changes)


@contextmanager
def stopping_after(batches: int) -> Iterator[None]:
    """Training is interrupted before its next batch, once it has taken so many; stands in for Ctrl-C and for a kill."""
    taken, train_batch = [], StageLoop._train_batch

    def stopping(loop, batch):
        if len(taken) == batches:
            raise KeyboardInterrupt
        taken.append(batch)
        train_batch(loop, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "_train_batch", stopping)
        yield
