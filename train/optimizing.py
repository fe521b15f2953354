"""The optimiser of a stage and the course of its learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from train.config import Stage1Config, Stage2Config

# AdamW's own; beta 1 is --stageN.momentum.
BETA_2 = 0.999


def optimizer_of(groups: list[dict[str, Any]], settings: Stage1Config | Stage2Config) -> Optimizer:
    """The optimiser of a stage.

    Args:
        groups: parameters, in groups that may have a learning rate of their own.
        settings: of the stage.
    """
    if settings.optimizer == "sgd":
        return SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    betas = (settings.momentum, BETA_2)
    return AdamW(groups, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)


def schedule_of(optimizer: Optimizer, settings: Stage1Config | Stage2Config, steps: int) -> LRScheduler:
    """The learning rate's course over a stage: up in equal steps while it warms up, then to 0 along a cosine.

    Args:
        optimizer: of the stage.
        settings: of the stage.
        steps: batches in an epoch.
    """
    total, warmup = settings.epochs * steps, settings.warmup_epochs * steps
    if not warmup:
        return CosineAnnealingLR(optimizer, T_max=total)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return LambdaLR(optimizer, share)
