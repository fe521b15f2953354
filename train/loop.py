"""The loop that trains either stage: checkpoints, history, TensorBoard, a progress bar, one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from train.checkpoint import STATE_FILE, append_history, save_state
from train.config import RunConfig
from train.errors import TrainingError
from train.methods import METHODS
from train.optimizing import optimizer_of, schedule_of
from train.stage import DEGENERATE, Batch, Stage


@dataclass
class Position:
    """Where a run stands: the next batch to train, and what the epoch so far has summed up."""

    stage: int = 1
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class StageLoop:
    """Trains one stage from a position on, with checkpoints, history, TensorBoard and a progress bar.

    Args:
        stage: what to train.
        run: run folder.
        config: of the run.
        position: where to start; changed as training goes on.
        saved: what `save_state` wrote for this stage, or None at its beginning.
        fingerprint: entries that every checkpoint carries, so that a resume can refuse a changed run.
    """

    def __init__(
        self,
        stage: Stage,
        run: Path,
        config: RunConfig,
        position: Position,
        saved: dict[str, Any] | None,
        fingerprint: dict[str, str],
    ) -> None:
        self.stage, self.run, self.config, self.position = stage, run, config, position
        self.fingerprint = fingerprint
        settings = stage.settings
        self.optimizer = optimizer_of(stage.parameter_groups(), settings)
        self.scheduler = schedule_of(self.optimizer, settings, stage.steps)
        if saved is not None:
            self._restore(saved)
        self.losses: nn.Module = _Losses(stage)
        if stage.ranks.size > 1:
            # It averages the gradients of the processes, each world size times its part of the joint gradient.
            # find_unused_parameters keeps its buckets as they are, and with them the order of every sum.
            self.losses = DistributedDataParallel(self.losses, broadcast_buffers=False, find_unused_parameters=True)

    def train(self) -> None:
        """Train to the end of the stage.

        Raises:
            TrainingError: the loss is not finite; the last checkpoint stays.
        """
        stage, position = self.stage, self.position
        epochs = stage.settings.epochs
        # TensorBoard counts through both stages.
        both = stage.number == 2 and METHODS[self.config.method].natural_traces
        offset = self.config.stage1.epochs if both else 0
        first = stage.ranks.first
        with (
            SummaryWriter(str(self.run), purge_step=offset + position.epoch) if first else nullcontext() as board,
            _progress_bar(shown=first) as progress,
        ):
            bar = progress.add_task(f"stage {stage.number}", total=epochs * stage.steps)
            say = partial(progress.console.print, soft_wrap=True, highlight=False)
            while position.epoch < epochs:
                began = time.perf_counter()
                self._train_epoch(lambda done: progress.update(bar, completed=done))
                record = self._finish_epoch(time.perf_counter() - began, say)
                for name, value in record.items():
                    if board is not None and name not in ("stage", "epoch"):
                        board.add_scalar(f"stage{stage.number}/{name}", value, offset + int(record["epoch"]))

    def _train_epoch(self, report_progress: Callable[[int], None]) -> None:
        stage, position, every = self.stage, self.position, self.config.checkpoint_steps
        stage.set_train_mode()
        for batch in stage.batches(position.epoch, position.step):
            self._train_batch(batch)
            position.step += 1
            report_progress(position.epoch * stage.steps + position.step)
            if every and position.step % every == 0 and position.step < stage.steps:
                self.save()

    def _train_batch(self, batch: Batch) -> None:
        pictures = self.stage.pictures(self.position.step)
        losses = self.losses(batch, pictures)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"stage {self.stage.number}, epoch {self.position.epoch}, batch {self.position.step}",
                got=f"a loss of {loss.item()}",
                wanted="a finite loss",
                remedy=f"lower --stage{self.stage.number}.lr or raise --temperature; the last checkpoint is kept",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        sums, counts = self.position.sums, self.position.counts
        for name, value in losses.items():
            if value.dtype == torch.bool:
                counts[name] = counts.get(name, 0) + int(value)
            else:
                sums[name] = sums.get(name, 0.0) + value.item() * pictures

    def _finish_epoch(self, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
        stage, position = self.stage, self.position
        # Batch norm in train mode leaves each process with the statistics of its own rows; the first one's count.
        stage.ranks.share_buffers(stage.model)
        means = {name: total / stage.epoch_pictures for name, total in position.sums.items()}
        figures, warnings = stage.epoch_report()
        degenerate = {name: count for name, count in position.counts.items() if count}
        warnings += [f"{count} of {stage.steps} batches {DEGENERATE[name]}" for name, count in degenerate.items()]
        record = {"stage": stage.number, "epoch": position.epoch, "lr": self.scheduler.get_last_lr()[0]}
        record |= means | figures | position.counts | {"seconds": round(seconds, 3)}
        if stage.ranks.first:
            append_history(self.run, record)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in (means | figures).items())
            say(f"stage {stage.number} epoch {position.epoch + 1}/{stage.settings.epochs}  {shown}  {seconds:.0f} s")
            for warning in warnings:
                say(f"warning: {warning}")
        position.epoch, position.step, position.sums, position.counts = position.epoch + 1, 0, {}, {}
        if position.epoch % self.config.checkpoint_epochs == 0 or position.epoch == stage.settings.epochs:
            self.save()
        return record

    def save(self) -> None:
        """Write everything that an exact resume needs; the first process does.

        Raises:
            TrainingError: a weight is not finite; the last checkpoint stays.
        """
        if not self.stage.ranks.first:
            return
        self._refuse_broken_weights()
        position = self.position
        state = {
            "stage": position.stage,
            "epoch": position.epoch,
            "step": position.step,
            "sums": dict(position.sums),
            "counts": dict(position.counts),
            "model": self.stage.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_state(self.run / STATE_FILE, state | self.fingerprint)

    def _refuse_broken_weights(self) -> None:
        """A finite loss may still have an infinite gradient, and would spoil the last good checkpoint."""
        for name, value in self.stage.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise TrainingError(
                    f"stage {self.stage.number}, epoch {self.position.epoch}, batch {self.position.step}",
                    got=f"values in {name} that are not finite",
                    wanted="finite weights",
                    remedy=f"lower --stage{self.stage.number}.lr or raise --temperature; the last checkpoint is kept",
                )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.stage.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])


class _Losses(nn.Module):
    """A stage's losses as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model = stage.model
        self._losses = stage.losses

    def forward(self, batch: Batch, pictures: int) -> dict[str, Tensor]:
        return self._losses(batch, pictures)


def _progress_bar(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
