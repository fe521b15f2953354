"""A data set and a configuration small enough to train in a second, for tests of training, export and reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
GENERATOR = "halved"


def write_pictures(root: Path, *, counts: dict[str, int], side: int = 176, seed: int = 0) -> Path:
    """Noise with structure as "real"; the same at half resolution and half as bright as "fake".

    The brightness is there so that an encoder with random weights can tell the two apart after a few steps.

    Args:
        root: folder to make `<split>/halved/{0_real,1_fake}/` in.
        counts: pictures of each class in each split.
        side: of the square pictures, in pixels.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for index in range(count):
            coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            base = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            real = np.clip(base + rng.normal(0, 24, base.shape), 0, 255).astype(np.uint8)
            small = Image.fromarray(real).resize((side // 2, side // 2), Image.Resampling.BOX)
            fake = np.asarray(small.resize((side, side), Image.Resampling.NEAREST)) // 2
            for folder, pixels in (("0_real", real), ("1_fake", fake)):
                path = root / split / GENERATOR / folder / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


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
