"""Pictures in many variants, each decoded once, and their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from runtime.preprocess import PreprocessSpec, prepare
from train.metrics import Array
from train.perturbations import Operation, perturbed
from train.pictures import PictureRecord, load_pixels

ImageScorer: TypeAlias = Callable[[Tensor], Array]  # (N, H, W, 3) uint8 to raw logits (N,)


class VariantDataset(Dataset[NDArray[np.uint8]]):
    """Each record in all variants (V, H, W, 3), as the detector sees them; decoded once."""

    def __init__(
        self,
        records: Sequence[PictureRecord],
        variants: Sequence[tuple[Operation, float]],
        spec: PreprocessSpec,
        seed: int = 0,
    ) -> None:
        self.records, self.variants, self.spec, self.seed = records, variants, spec, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        record = self.records[index]
        rgb, key = load_pixels(record), record.content_sha256()
        changed = np.empty((len(self.variants), self.spec.height, self.spec.width, 3), dtype=np.uint8)
        for number, (operation, strength) in enumerate(self.variants):
            changed[number] = prepare(perturbed(rgb, operation, strength, key=key, seed=self.seed), self.spec)
        return changed


def variant_logits(
    dataset: VariantDataset, score: ImageScorer, *, batch_size: int = 32, workers: int = 0, progress: bool = True
) -> NDArray[np.float32]:
    """Logits (V, N) of every variant; batches hold the same pictures as those of `train.scoring.score_pictures`."""
    # One item at a time: a batch of all variants, prefetched by every worker, would take gigabytes.
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, generator=torch.Generator())
    logits = np.empty((len(dataset.variants), len(dataset)), dtype=np.float32)
    done = 0
    pictures = track(loader, "robustness", total=len(dataset), disable=not progress)
    for batch in _chunks(iter(pictures), batch_size):
        for number in range(len(dataset.variants)):
            images = torch.stack([picture[number] for picture in batch])
            logits[number, done : done + len(batch)] = score(images)
        done += len(batch)
    return logits


def _chunks(items: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
