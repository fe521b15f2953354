"""Batches of training views whose content depends on (seed, stage, epoch, picture) alone.

No generator carries state from one picture to the next: the same batches come out with any number of workers,
and a resumed run starts in the middle of an epoch without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.preprocess import PreprocessSpec, prepare
from train.config import AugmentConfig
from train.pictures import PictureRecord, load_pixels
from train.ranks import ALONE, Ranks
from train.transforms import random_view


class Key(NamedTuple):
    """One draw of one picture."""

    epoch: int
    index: int


class ViewBatch(NamedTuple):
    """Two views of each of B pictures."""

    first: Tensor  # (B, H, W, 3) uint8
    second: Tensor  # (B, h, w, 3) uint8
    labels: Tensor  # (B,) int64


@dataclass(frozen=True)
class ViewPlan:
    """Which views a stage draws.

    Attributes:
        seed: of the run; gives the order of the pictures.
        stage: 1 or 2; the stages draw differently from the same seed.
        first: rows and columns of the first view.
        second: rows and columns of the second, independently cropped view.
        augment: what happens to a view besides cropping.
        draws: different views of a picture, gone through epoch by epoch; 0 draws new ones in each epoch.
        view_seed: gives the views; None for the run's seed.
    """

    seed: int
    stage: int
    first: tuple[int, int]
    second: tuple[int, int]
    augment: AugmentConfig
    draws: int = 0
    view_seed: int | None = None

    @property
    def seed_of_views(self) -> int:
        """The seed that the views are drawn from."""
        return self.seed if self.view_seed is None else self.view_seed

    def views(self) -> dict[str, Any]:
        """What the views depend on, besides the picture and the number of the draw; as JSON types."""
        values = asdict(self) | {"seed": self.seed_of_views}
        del values["view_seed"]
        return values

    def draw(self, epoch: int) -> int:
        """Number of the views that an epoch sees."""
        return epoch % self.draws if self.draws else epoch


class ViewDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Random views of the records, one item per `Key`."""

    def __init__(self, records: Sequence[PictureRecord], plan: ViewPlan) -> None:
        self.records = records
        self.plan = plan

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, int]:
        record, plan = self.records[key.index], self.plan
        rng = np.random.default_rng([plan.seed_of_views, plan.stage, plan.draw(key.epoch), key.index])
        rgb = load_pixels(record)
        first = random_view(rgb, plan.first, plan.augment, rng)
        return first, random_view(rgb, plan.second, plan.augment, rng), record.label


class EpochBatches(Sampler[list[Key]]):
    """Batches of one epoch in the order that (seed, stage, epoch) gives, from batch `start` on.

    The last batch is smaller when the pictures do not fill it; no picture is left out. Several processes get
    consecutive parts of each batch; one whose part is empty gets a picture whose rows it has to leave out.
    With the labels of two classes to balance, an epoch has as many pictures of either, which take turns.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        plan: ViewPlan,
        epoch: int,
        start: int = 0,
        ranks: Ranks = ALONE,
        balance: Sequence[int] | None = None,
    ) -> None:
        self.batches = batch_count(epoch_pictures(count, balance), batch_size)
        self.balance = balance
        self.count, self.batch_size, self.plan, self.epoch, self.start = count, batch_size, plan, epoch, start
        self.ranks = ranks

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng([self.plan.seed, self.plan.stage, self.epoch])
        order = rng.permutation(self.count) if self.balance is None else balanced_order(self.balance, rng)
        for batch in range(self.start, self.batches):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            part = self.ranks.part(len(chosen))
            mine = chosen[part] if part.stop > part.start else chosen[-1:]
            yield [Key(self.epoch, int(index)) for index in mine]


class PreparedDataset(Dataset[NDArray[np.uint8]]):
    """Records as the exported model sees them: decoded, padded and centre cropped."""

    def __init__(self, records: Sequence[PictureRecord], spec: PreprocessSpec) -> None:
        self.records = records
        self.spec = spec

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return prepare(load_pixels(self.records[index]), self.spec)


def epoch_pictures(count: int, balance: Sequence[int] | None) -> int:
    """Pictures in an epoch of `count` records, of which those of the rarer class come again to be balanced."""
    return count if balance is None else 2 * max(sum(balance), len(balance) - sum(balance))


def balanced_order(labels: Sequence[int], rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of real and fake pictures in turn, as many of either.

    Args:
        labels: 0 real, 1 fake; both are there.
        rng: source of the order.

    Returns:
        All of the more frequent class once; those of the rarer one as often as each other, or once more.
    """
    classes = [np.flatnonzero(np.asarray(labels) == label) for label in (0, 1)]
    longest = max(map(len, classes))
    rows = [
        np.concatenate([rng.permutation(members) for _ in range(-(-longest // len(members)))])[:longest]
        for members in classes
    ]
    return np.stack(rows, axis=1).ravel()


def batch_count(pictures: int, batch_size: int) -> int:
    """Batches in an epoch, the last one perhaps smaller."""
    return -(-pictures // batch_size)


def view_loader(
    records: Sequence[PictureRecord],
    plan: ViewPlan,
    *,
    batch_size: int,
    epoch: int,
    start: int = 0,
    workers: int = 0,
    ranks: Ranks = ALONE,
    balance: Sequence[int] | None = None,
) -> DataLoader[ViewBatch]:
    """Loader over this process's part of the views of one epoch, from batch `start` on.

    Raises:
        PictureError: while iterating, for a picture that cannot be decoded.
    """
    return DataLoader(
        ViewDataset(records, plan),
        batch_sampler=EpochBatches(len(records), batch_size, plan, epoch, start, ranks, balance),
        num_workers=workers,
        collate_fn=_view_batch,
        # Its own generator: the loader would otherwise draw from, and so shift, the run's random numbers.
        generator=torch.Generator(),
    )


def prepared_loader(
    records: Sequence[PictureRecord], spec: PreprocessSpec, *, batch_size: int, workers: int = 0
) -> DataLoader[Tensor]:
    """Loader of (N, H, W, 3) uint8 batches in the order of the records.

    Raises:
        PictureError: while iterating, for a picture that cannot be decoded.
    """
    return DataLoader(
        PreparedDataset(records, spec),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_image_batch,
        generator=torch.Generator(),
    )


def _view_batch(items: list[tuple[Tensor, Tensor, int]]) -> ViewBatch:
    first, second, labels = zip(*items, strict=True)
    return ViewBatch(torch.stack(first), torch.stack(second), torch.tensor(labels))


def _image_batch(items: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(items))
