"""Which part of a split a run takes: some of its generators, and a share of their originals.

A share is of originals and not of pictures, so that fewer originals also means less variety: two crops of one
photograph are hardly more than one. Originals are drawn within each generator, apart for those that have real
pictures, fake ones or both, so that the classes keep their proportion.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from train.config import RunConfig
from train.errors import ConfigError
from train.pictures import PictureRecord, PictureSet


@dataclass(frozen=True)
class Selection:
    """The part of a split.

    Attributes:
        option: that names the generators, for errors.
        generators: whose pictures are taken; empty takes all.
        share: of the originals of each generator, in (0, 1].
        seed: that draws them.
    """

    option: str = ""
    generators: tuple[str, ...] = ()
    share: float = 1.0
    seed: int = 0

    def of(self, pictures: PictureSet) -> PictureSet:
        """The selected pictures, in their order.

        Raises:
            ConfigError: a generator that the split does not have.
        """
        records = pictures.records
        if self.generators:
            self._refuse_unknown({record.generator for record in records})
            records = tuple(record for record in records if record.generator in self.generators)
        if self.share < 1:
            records = _share_of_originals(records, self.share, self.seed)
        return replace(pictures, records=records)

    def describe(self, subject: str) -> str:
        """What an error calls the selected part of `subject`."""
        return f"{subject} ({self.option} {' '.join(self.generators)})" if self.generators else subject

    def _refuse_unknown(self, known: set[str]) -> None:
        unknown = sorted(set(self.generators) - known)
        if unknown:
            raise ConfigError(
                self.option,
                got=", ".join(unknown),
                wanted=f"generators of that split: {', '.join(sorted(known))}",
                remedy="name some of these, or leave the option out to take all",
            )


def selection_of(config: RunConfig, split: str) -> Selection:
    """What a run takes of a split of its collection: all of it, but for training and validation."""
    if split == "train":
        return Selection("--train-generators", config.train_generators, config.train_share, config.seed)
    if split == "val":
        return Selection("--val-generators", config.val_generators)
    return Selection()


def _share_of_originals(records: Iterable[PictureRecord], share: float, seed: int) -> tuple[PictureRecord, ...]:
    """Pictures of the first `share` of the originals, at least one of each kind, in an order that the seed gives.

    The order is a hash of the original's name: the same in each generator, and a smaller share is a part of a larger.
    """
    records = tuple(records)
    labels: dict[tuple[str, str], set[int]] = {}
    for record in records:
        labels.setdefault((record.generator, record.original_id), set()).add(record.label)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (generator, original), found in labels.items():
        kinds.setdefault((generator, tuple(sorted(found))), []).append(original)
    kept: set[tuple[str, str]] = set()
    for (generator, _), originals in kinds.items():
        ordered = sorted(originals, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
        kept |= {(generator, name) for name in ordered[: math.ceil(share * len(ordered))]}
    return tuple(record for record in records if (record.generator, record.original_id) in kept)
