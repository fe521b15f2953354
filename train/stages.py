"""Both stages of the method, and the one loop that trains either."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from cpp_ext import soft_contrastive_loss
from cpp_ext.ops import Implementation
from train.checkpoint import STATE_FILE, append_history, save_state
from train.config import RunConfig, Stage1Config, Stage2Config
from train.data import PictureRecord
from train.errors import ConfigError, TrainingError
from train.loading import ViewBatch, ViewPlan, batch_count, prepared_loader, view_loader
from train.losses import detector_loss, natural_trace_loss, spread_of
from train.model import NTFDetector, TraceModel, freeze_natural_traces
from train.scoring import preprocess_spec, score_pictures

# Rows all over the sphere have a standard deviation of 1 / sqrt(C) a dimension. Eq. (2) pulls them together on purpose;
# at 3 % of it the mean squared distance of two rows is 0.002 of at most 4, and they say the same of every picture.
COLLAPSE_STD_SHARE = 0.03
# One direction has rank 1; below 2 the homogeneous features say the same of every picture.
COLLAPSE_RANK = 2.0
SPREAD_PICTURES = 256


@dataclass
class Position:
    """Where a run stands: the next batch to train, and what the epoch so far has summed up."""

    stage: int = 1
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)


class Stage(ABC):
    """What the loop needs to know of a stage.

    Attributes:
        number: 1 or 2.
        model: the whole network; only `trainable()` of it changes.
        records: training pictures.
        settings: epochs, batch size and optimiser.
        plan: the views to draw.
    """

    number: int
    model: nn.Module
    records: Sequence[PictureRecord]
    settings: Stage1Config | Stage2Config
    plan: ViewPlan

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that the optimiser may change."""

    @abstractmethod
    def set_train_mode(self) -> None:
        """Train mode for what is trained, eval mode for what is frozen."""

    @abstractmethod
    def losses(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Scalars of a batch; "loss" is the one that is minimised."""

    @abstractmethod
    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """Figures for the history after an epoch, and warnings for the reader."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return batch_count(len(self.records), self.settings.batch_size)


class TraceStage(Stage):
    """Stage 1: natural traces from real pictures alone, Eqs. (1) to (4)."""

    number = 1

    def __init__(self, model: TraceModel, records: Sequence[PictureRecord], config: RunConfig) -> None:
        self.model: TraceModel = model
        self.records = [record for record in records if record.label == 0]
        self.config = config
        self.settings = config.stage1
        size = model.encoder.input_size
        self.plan = ViewPlan(config.seed, 1, size, size, config.augment)

    def trainable(self) -> list[nn.Parameter]:
        self.model.encoder.requires_grad_(self.config.stage1.train_encoder)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_train_mode(self) -> None:
        self.model.train()
        self.model.encoder.train(self.config.stage1.train_encoder)

    def losses(self, batch: ViewBatch) -> dict[str, Tensor]:
        z_hom, z_het = self.model(torch.cat((batch.first, batch.second)))
        loss = self.config.loss
        result = natural_trace_loss(
            z_hom,
            z_het,
            temperature=loss.temperature,
            lambda_orth=loss.lambda_orth,
            hom_reduction=loss.hom_reduction,
            hom_topk=loss.hom_topk,
            orth=loss.orth,
        )
        return {
            "loss": result.total,
            "homogeneous": result.homogeneous,
            "heterogeneous": result.heterogeneous,
            "orthogonality": result.orthogonality,
        }

    @torch.inference_mode()
    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """Spread of the homogeneous rows over up to 256 training pictures; Eq. (2) alone would collapse them."""
        self.model.eval()
        device = next(self.model.parameters()).device
        spec = preprocess_spec(self.model.encoder)
        loader = prepared_loader(self.records[:SPREAD_PICTURES], spec, batch_size=32)
        rows = torch.cat([self.model(images.to(device))[0] for images in loader])
        if len(rows) < 2:
            return {}, []
        spread = spread_of(rows)
        figures = {"hom_std": spread.std, "hom_effective_rank": spread.effective_rank}
        floor = COLLAPSE_STD_SHARE / math.sqrt(rows.shape[1])
        if spread.std >= floor and spread.effective_rank >= COLLAPSE_RANK:
            return figures, []
        return figures, [
            f"the homogeneous features are close to one constant vector (standard deviation {spread.std:.4f}, floor "
            f"{floor:.4f}; effective rank {spread.effective_rank:.1f}, floor {COLLAPSE_RANK}): train stage 1 for fewer "
            "epochs, lower its learning rate, or take --hom-reduction mean"
        ]


class DetectorStage(Stage):
    """Stage 2: real against fake on the frozen encoder, Eqs. (5) to (7).

    Args:
        model: the detector; its encoder and natural traces stay as they are.
        records: training pictures.
        config: of the run.
        validation: pictures to score after each epoch.
        loss_backend: implementation of Eq. (5).
    """

    number = 2

    def __init__(
        self,
        model: NTFDetector,
        records: Sequence[PictureRecord],
        config: RunConfig,
        validation: Sequence[PictureRecord],
        loss_backend: Implementation,
    ) -> None:
        self.model: NTFDetector = model
        self.records = list(records)
        self.validation = validation
        self.config = config
        self.settings = config.stage2
        self.loss_backend = loss_backend
        crop = config.stage2.scl_crop
        if model.encoder.fixed_input_size and (crop, crop) != model.input_size:
            raise ConfigError(
                "--stage2.scl-crop",
                got=f"{crop} with {model.encoder_name}, whose input size is fixed",
                wanted=f"{model.input_size[0]}",
                remedy="pass the encoder's input size, or choose a convolutional encoder",
            )
        self.plan = ViewPlan(config.seed, 2, model.input_size, (crop, crop), config.augment)

    def trainable(self) -> list[nn.Parameter]:
        freeze_natural_traces(self.model)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_train_mode(self) -> None:
        self.model.train()
        freeze_natural_traces(self.model)

    def losses(self, batch: ViewBatch) -> dict[str, Tensor]:
        model, loss = self.model, self.config.loss
        with torch.no_grad():
            embeddings = model.embed(batch.first)
            crops = model.embed(batch.second)
            real = batch.labels == 0
            seen = embeddings if self.config.stage2.trace_crop == "input" else crops
            traces = model.head_hom(seen[real])
        contrastive = soft_contrastive_loss(
            model.projection(crops),
            batch.labels,
            traces,
            temperature=loss.temperature,
            eta=loss.eta,
            form=loss.scl_form,
            denominator=loss.scl_denominator,
            backend=self.loss_backend,
        )
        logits = model.classify(embeddings, model.projection(embeddings))
        result = detector_loss(contrastive, logits, batch.labels, gamma=loss.gamma)
        return {
            "loss": result.total,
            "contrastive": result.contrastive,
            "classification": result.classification,
            "accuracy": ((logits > 0) == (batch.labels == 1)).float().mean(),
        }

    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """AP and accuracy at 0.5 on the validation pictures."""
        scores = score_pictures(self.model, self.validation, progress=False, workers=self.config.workers)
        labels = np.array([record.label for record in self.validation])
        return {
            "val_ap": float(average_precision_score(labels, scores.logits)),
            "val_accuracy": float(np.mean((scores.logits > 0) == (labels == 1))),
        }, []


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
        self.optimizer = torch.optim.SGD(
            stage.trainable(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=settings.epochs * stage.steps)
        if saved is not None:
            self._restore(saved)

    def train(self) -> None:
        """Train to the end of the stage.

        Raises:
            TrainingError: the loss is not finite; the last checkpoint stays.
        """
        stage, position = self.stage, self.position
        epochs = stage.settings.epochs
        offset = self.config.stage1.epochs if stage.number == 2 else 0  # TensorBoard counts through both stages
        with (
            SummaryWriter(str(self.run), purge_step=offset + position.epoch) as board,
            _progress_bar() as progress,
        ):
            bar = progress.add_task(f"stage {stage.number}", total=epochs * stage.steps)
            say = partial(progress.console.print, soft_wrap=True, highlight=False)
            while position.epoch < epochs:
                began = time.perf_counter()
                self._train_epoch(lambda done: progress.update(bar, completed=done))
                record = self._finish_epoch(time.perf_counter() - began, say)
                for name, value in record.items():
                    if name not in ("stage", "epoch"):
                        board.add_scalar(f"stage{stage.number}/{name}", value, offset + int(record["epoch"]))

    def _train_epoch(self, report_progress: Callable[[int], None]) -> None:
        stage, position, every = self.stage, self.position, self.config.checkpoint_steps
        stage.set_train_mode()
        loader = view_loader(
            stage.records,
            stage.plan,
            batch_size=stage.settings.batch_size,
            epoch=position.epoch,
            start=position.step,
            workers=self.config.workers,
        )
        device = next(stage.model.parameters()).device
        for batch in loader:
            self._train_batch(ViewBatch(*(tensor.to(device) for tensor in batch)))
            position.step += 1
            report_progress(position.epoch * stage.steps + position.step)
            if every and position.step % every == 0 and position.step < stage.steps:
                self.save()

    def _train_batch(self, batch: ViewBatch) -> None:
        losses = self.stage.losses(batch)
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
        for name, value in losses.items():
            total = self.position.sums.get(name, 0.0)
            self.position.sums[name] = total + value.item() * len(batch.labels)

    def _finish_epoch(self, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
        stage, position = self.stage, self.position
        means = {name: total / len(stage.records) for name, total in position.sums.items()}
        figures, warnings = stage.epoch_report()
        record = {"stage": stage.number, "epoch": position.epoch, "lr": self.scheduler.get_last_lr()[0]}
        record |= means | figures | {"seconds": round(seconds, 3)}
        append_history(self.run, record)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in (means | figures).items())
        say(f"stage {stage.number} epoch {position.epoch + 1}/{stage.settings.epochs}  {shown}  {seconds:.0f} s")
        for warning in warnings:
            say(f"warning: {warning}")
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        self.save()
        return record

    def save(self) -> None:
        """Write everything that an exact resume needs."""
        position = self.position
        state = {
            "stage": position.stage,
            "epoch": position.epoch,
            "step": position.step,
            "sums": dict(position.sums),
            "model": self.stage.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_state(self.run / STATE_FILE, state | self.fingerprint)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.stage.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
