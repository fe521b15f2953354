"""What the loop needs of a stage, and the views that each stage draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.config import RunConfig, Stage1Config, Stage2Config
from train.encoder import Encoder
from train.errors import ConfigError
from train.feature_cache import StageCache
from train.loading import EpochBatches, ViewBatch, ViewPlan, batch_count, epoch_pictures, view_loader
from train.model import EncodingModel
from train.pictures import PictureRecord
from train.ranks import Ranks

# Boolean entries of `Stage.losses` count batches in which a loss has nothing to work on, and what that means.
ONE_PICTURE, ONE_CLASS, NO_REAL = "one_picture_batches", "one_class_batches", "no_real_batches"
DEGENERATE = {
    ONE_PICTURE: "had one picture alone: no other to be compared with in Eqs. (1) and (2)",
    ONE_CLASS: "had one class alone: nothing to tell apart",
    NO_REAL: "had no real picture, so no natural traces and no contrastive loss",
}


class FeatureBatch(NamedTuple):
    """Embeddings of two views of each of B pictures, as the encoder gives them."""

    first: Tensor  # (B, d)
    second: Tensor  # (B, d)
    labels: Tensor  # (B,) int64


Batch = ViewBatch | FeatureBatch


class Stage(ABC):
    """What the loop needs to know of a stage.

    Attributes:
        number: 1 or 2.
        model: the whole network; only `trainable()` of it changes.
        records: training pictures.
        settings: epochs, batch size and optimiser.
        plan: the views to draw.
        config: of the run.
        ranks: the processes that train it together.
        cache: embeddings that were computed before, or None; for a frozen encoder.
        balance: labels of the records where both classes are to come alike, or None.
    """

    number: int
    model: EncodingModel
    records: Sequence[PictureRecord]
    settings: Stage1Config | Stage2Config
    plan: ViewPlan
    config: RunConfig
    ranks: Ranks
    cache: StageCache | None = None
    balance: Sequence[int] | None = None

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that the optimiser may change."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The same in groups, of which one may have a learning rate of its own."""
        return [{"params": self.trainable()}]

    @abstractmethod
    def set_train_mode(self) -> None:
        """Train mode for what is trained, eval mode for what is frozen."""

    @abstractmethod
    def encode(self, batch: ViewBatch) -> FeatureBatch:
        """Embeddings of a batch; without gradient where the encoder is frozen."""

    @abstractmethod
    def losses(self, batch: Batch, pictures: int) -> dict[str, Tensor]:
        """Scalars of a joint batch of so many pictures, alike in all processes; "loss" is the one that is minimised.

        Boolean ones are those of `DEGENERATE`, which are counted.

        Args:
            batch: this process's part.
            pictures: of the joint batch.
        """

    @abstractmethod
    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """Figures for the history after an epoch, and warnings for the reader."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return batch_count(self.epoch_pictures, self.settings.batch_size)

    @cached_property
    def epoch_pictures(self) -> int:
        """Pictures in an epoch."""
        return epoch_pictures(len(self.records), self.balance)

    def pictures(self, step: int) -> int:
        """Pictures of the joint batch `step`; the last one may have fewer."""
        size = self.settings.batch_size
        return min(size, self.epoch_pictures - step * size)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """This process's parts of the batches of an epoch, from batch `start` on, on the model's device."""
        if self.cache is None:
            yield from self.view_batches(epoch, start)
            return
        cache, draw = self.cache.views, self.plan.draw(epoch)
        size = self.settings.batch_size
        keys = list(EpochBatches(len(self.records), size, self.plan, epoch, start, self.ranks, self.balance))
        known = next((step for step, batch in enumerate(keys) if not cache.holds(draw, batch)), len(keys))
        for batch_keys in keys[:known]:
            labels = torch.tensor([self.records[key.index].label for key in batch_keys])
            first, second = cache.read(draw, batch_keys)
            yield FeatureBatch(*(part.to(self.device) for part in (first, second, labels)))
        if known == len(keys):
            return
        for batch_keys, views in zip(keys[known:], self.view_batches(epoch, start + known), strict=True):
            features = self.encode(views)
            cache.write(draw, batch_keys, features.first, features.second)
            yield features

    def view_batches(self, epoch: int, start: int) -> Iterator[ViewBatch]:
        """The same, as pixels."""
        loader = view_loader(
            self.records,
            self.plan,
            batch_size=self.settings.batch_size,
            epoch=epoch,
            start=start,
            workers=self.config.workers,
            ranks=self.ranks,
            balance=self.balance,
        )
        for batch in loader:
            yield ViewBatch(*(tensor.to(self.device) for tensor in batch))

    def features(self, batch: Batch) -> FeatureBatch:
        """Embeddings e of a batch."""
        found = batch if isinstance(batch, FeatureBatch) else self.encode(batch)
        standardizer = self.model.encoder.standardizer
        if isinstance(standardizer, nn.Identity):
            return found
        return FeatureBatch(standardizer(found.first.float()), standardizer(found.second.float()), found.labels)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


def require_crop(encoder: Encoder, option: str, side: int) -> None:
    """Refuse crops that the encoder cannot take; 0 stands for its input size.

    Raises:
        ConfigError: the encoder's input size is fixed, and another one.
    """
    if encoder.fixed_input_size and side and (side, side) != encoder.input_size:
        raise ConfigError(
            option,
            got=f"{side} with {encoder.name}, whose input size is fixed",
            wanted=f"{encoder.input_size[0]}",
            remedy="pass the encoder's input size, or choose a convolutional encoder",
        )


def stage1_plan(config: RunConfig, input_size: tuple[int, int]) -> ViewPlan:
    """The views that stage 1 draws: two of one size; a trained encoder sees new ones in each epoch."""
    draws = 0 if config.stage1.train_encoder else config.cache.cached_views
    size = _crop_size(config, input_size)
    return ViewPlan(config.seed, 1, size, size, config.augment, draws, config.cache.view_seed)


def stage2_plan(config: RunConfig, input_size: tuple[int, int]) -> ViewPlan:
    """The views that stage 2 draws: one for the classifier, a small crop for Eq. (5)."""
    crop, cache = config.stage2.scl_crop, config.cache
    size = _crop_size(config, input_size)
    return ViewPlan(config.seed, 2, size, (crop, crop), config.augment, cache.cached_views, cache.view_seed)


def _crop_size(config: RunConfig, input_size: tuple[int, int]) -> tuple[int, int]:
    crop = config.augment.crop
    return (crop, crop) if crop else input_size
