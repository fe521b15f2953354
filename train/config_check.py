"""What a configuration must fulfil before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from train.config import (
    AugmentConfig,
    DecisionConfig,
    ModelConfig,
    NearestConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
)
from train.equalize import check_equalize
from train.errors import ConfigError

# Of a picture's side; below this, hardly a pixel of it is left.
_SMALLEST_FACTOR = 0.01
_POSITIVE = "a number above 0"
_WEIGHT = "0 or a number above it"
_RATE = "a share between 0 and 1"


class Rule(NamedTuple):
    """What is wanted of an option, and whether its value is that."""

    option: str
    value: object
    holds: bool
    wanted: str


def check_config(config: RunConfig) -> None:
    """Refuse values that do not make sense.

    Raises:
        ConfigError: naming the option.
    """
    for option, value, holds, wanted in _rules(config):
        if not holds:
            raise ConfigError(option, got=str(value), wanted=wanted, remedy="change this option")
    check_equalize(config.equalize)
    if not config.data:
        raise ConfigError(
            "--data",
            got="nothing",
            wanted="a folder, shards or a list with a train and a val split",
            remedy="pass --data DIR, or --data demo for the demo pictures",
        )


def _rules(config: RunConfig) -> Iterator[Rule]:
    yield from _loss_rules(config)
    yield from _model_rules(config.model)
    yield from _augment_rules(config.augment)
    yield from _nearest_rules(config.nearest)
    yield from _decision_rules(config.decision)
    yield from _stage_rules("stage1", config.stage1)
    yield from _stage_rules("stage2", config.stage2)
    yield from _detector_rules(config.stage2)
    yield Rule("--train-share", config.train_share, 0 < config.train_share <= 1, "a share above 0 and up to 1")
    yield _at_least(0, "--workers", config.workers)
    yield _at_least(0, "--seed", config.seed)
    yield _at_least(0, "--checkpoint-steps", config.checkpoint_steps)
    yield _at_least(1, "--checkpoint-epochs", config.checkpoint_epochs)
    yield _at_least(0, "--cached-views", config.cache.cached_views)
    yield _at_least(0, "--view-seed", config.cache.view_seed or 0)


def _loss_rules(config: RunConfig) -> Iterator[Rule]:
    loss = config.loss
    both = f"{loss.scl_weight:g} with --gamma {loss.gamma:g}"
    yield Rule("--temperature", loss.temperature, loss.temperature > 0, _POSITIVE)
    yield Rule("--lambda-het", loss.lambda_het, _is_weight(loss.lambda_het), _WEIGHT)
    yield Rule("--scl-weight", loss.scl_weight, _is_weight(loss.scl_weight), _WEIGHT)
    yield Rule("--scl-weight", both, loss.scl_weight > 0 or loss.gamma > 0, "one of the two losses of Eq. (7)")
    yield Rule("--hom-topk", loss.hom_topk, loss.hom_topk > 0, _POSITIVE)


def _model_rules(model: ModelConfig) -> Iterator[Rule]:
    yield Rule("--embedding-dim", model.embedding_dim, model.embedding_dim > 0, _POSITIVE)
    yield _at_least(0, "--head-width", model.head_width)


def _augment_rules(augment: AugmentConfig) -> Iterator[Rule]:
    yield _at_least(0, "--crop", augment.crop)
    yield Rule("--colour-jitter", augment.colour_jitter, 0 <= augment.colour_jitter < 1, "[0, 1)")
    yield Rule("--grey", augment.grey, 0 <= augment.grey <= 1, "[0, 1]")
    yield from _disturbance("blur", augment.blur_share, "sigma", augment.blur_sigma, (0, math.inf))
    yield from _disturbance("jpeg", augment.jpeg_share, "quality", augment.jpeg_quality, (1, 100))
    yield from _disturbance(
        "rescale", augment.rescale_share, "factor", augment.rescale_factor, (_SMALLEST_FACTOR, math.inf)
    )
    yield from _disturbance("noise", augment.noise_share, "std", augment.noise_std, (0, math.inf))


def _disturbance(
    name: str, share: float, measure: str, values: tuple[float, float], limits: tuple[float, float]
) -> Iterator[Rule]:
    """Of a disturbance that a share of the pictures gets, with a strength between two values."""
    (low, high), (least, most) = values, limits
    ordered = least <= low <= high <= most and math.isfinite(high)
    shown = f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} on"
    yield Rule(f"--{name}-share", share, 0 <= share <= 1, "[0, 1]")
    yield Rule(f"--{name}-{measure}", f"{low} {high}", ordered, f"two values from {shown}, the smaller first")


def _nearest_rules(nearest: NearestConfig) -> Iterator[Rule]:
    k, bank = nearest.nearest_k, nearest.nearest_bank
    yield _at_least(1, "--nearest-k", k)
    yield Rule("--nearest-bank", bank, bank == 0 or bank >= k, f"0, or at least --nearest-k {k}")


def _decision_rules(decision: DecisionConfig) -> Iterator[Rule]:
    flagged, missed = decision.real_flagged_rate, decision.fake_missed_rate
    yield Rule("--real-flagged-rate", flagged, 0 < flagged < 1, _RATE)
    yield Rule("--fake-missed-rate", missed, 0 < missed < 1, _RATE)


def _stage_rules(name: str, stage: Stage1Config | Stage2Config) -> Iterator[Rule]:
    warmup, epochs = stage.warmup_epochs, stage.epochs
    yield _at_least(1, f"--{name}.epochs", epochs)
    yield _at_least(2, f"--{name}.batch-size", stage.batch_size)
    yield Rule(f"--{name}.lr", stage.lr, _is_positive(stage.lr), _POSITIVE)
    yield Rule(
        f"--{name}.warmup-epochs",
        warmup,
        0 <= warmup < epochs,
        f"0 or more, and fewer than --{name}.epochs {epochs}",
    )


def _detector_rules(stage2: Stage2Config) -> Iterator[Rule]:
    factor = stage2.encoder_lr_factor
    yield Rule("--stage2.scl-crop", stage2.scl_crop, stage2.scl_crop > 0, _POSITIVE)
    yield _at_least(0, "--stage2.train-encoder-blocks", stage2.train_encoder_blocks)
    yield Rule("--stage2.encoder-lr-factor", factor, _is_positive(factor), _POSITIVE)


def _at_least(least: int, option: str, value: int) -> Rule:
    return Rule(option, value, value >= least, f"{least} or more")


def _is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _is_weight(value: float) -> bool:
    return value >= 0 and math.isfinite(value)
