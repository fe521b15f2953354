"""The frozen encoder's embeddings on disk, so that an epoch that sees the same pictures need not compute them.

A view is a function of (seed, stage, draw, picture), and a frozen encoder gives it one embedding: what is cached is
what would be computed, to the bit in the batches it was computed in; the same row in a batch of another size may differ
in its last bits. One file holds it all and is mapped into memory, so that the operating system decides how much of it
stays there. Its name is a hash of everything the embeddings depend on: pictures, encoder, views and arithmetic.
Each row carries a checksum; a row that was not written, or only in part, is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.errors import ConfigError, TrainingError
from train.loading import Key
from train.model import EncodingModel
from train.pictures import PictureRecord
from train.scoring import BATCH_SIZE, embedded_batches

SUFFIX = ".features"
_KEPT_FREE = 1 << 28  # bytes of disk left for checkpoints


@dataclass(frozen=True)
class CacheKey:
    """Everything that a cached embedding depends on; two runs with the same may share a file."""

    records: str
    encoder: str
    views: str
    arithmetic: str

    def name(self) -> str:
        """File name."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32] + SUFFIX


def cache_key(records: Sequence[PictureRecord], weights: str, views: Mapping[str, Any], arithmetic: Any) -> CacheKey:
    """The key of a file.

    Args:
        records: in the order that view indices count; their bytes count, not where they lie.
        weights: hash of the frozen encoder, from `weights_sha256`.
        views: what is seen of a picture, as JSON types.
        arithmetic: what else changes the embeddings' last bits, as JSON types.
    """
    pictures = "\n".join(record.content_sha256() for record in records)
    return CacheKey(
        records=hashlib.sha256(pictures.encode()).hexdigest(),
        encoder=weights,
        views=json.dumps(views, sort_keys=True),
        arithmetic=json.dumps(arithmetic, sort_keys=True),
    )


def weights_sha256(module: nn.Module) -> str:
    """Hex digest over names, shapes and values of a state dictionary."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Embeddings of the views of each picture, for a number of draws.

    Args:
        path: file to make, or to go on with.
        draws: different views of a picture.
        pictures: number of pictures.
        width: of an embedding.
        views: of a picture in one draw.

    Raises:
        ConfigError: the disk has no room for it.
    """

    def __init__(self, path: Path, *, draws: int, pictures: int, width: int, views: int = 2) -> None:
        self.path = path
        self.shape = (draws, pictures, views, width)
        rows = draws * pictures
        self.size_bytes = rows * 4 + rows * views * width * 4
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            self._make()
        self._sums = np.memmap(path, np.uint32, "r+", 0, (draws, pictures))
        self._rows = np.memmap(path, np.float32, "r+", rows * 4, self.shape)
        # What this process has seen to be whole: a checksum is computed once.
        self._whole = np.zeros((draws, pictures), dtype=bool)

    def holds(self, draw: int, keys: Sequence[Key]) -> bool:
        """Whether all embeddings of these pictures are there, and whole."""
        return all(self._is_whole(draw, key.index) for key in keys)

    def read(self, draw: int, keys: Sequence[Key]) -> tuple[Tensor, ...]:
        """Embeddings of the first and further views, each (B, width) float32."""
        return torch.from_numpy(self._rows[draw, [key.index for key in keys]]).unbind(1)

    def write(self, draw: int, keys: Sequence[Key], *views: Tensor) -> None:
        """Keep embeddings; arguments as `read` takes and returns them."""
        rows = torch.stack(views, dim=1).float().cpu().numpy()
        for key, row in zip(keys, rows, strict=True):
            self._rows[draw, key.index] = row
            self._sums[draw, key.index] = _checksum(row)
            self._whole[draw, key.index] = True

    def _is_whole(self, draw: int, index: int) -> bool:
        if not self._whole[draw, index]:
            kept = self._sums[draw, index]
            self._whole[draw, index] = kept != 0 and kept == _checksum(self._rows[draw, index])
        return bool(self._whole[draw, index])

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if self.size_bytes + _KEPT_FREE > free:
            raise ConfigError(
                "--cache-features",
                got=f"{free / 1e9:.1f} GB free in {self.path.parent}",
                wanted=f"{(self.size_bytes + _KEPT_FREE) / 1e9:.1f} GB",
                remedy="lower --cached-views, name a larger disk with --cache-dir, or leave --cache-features out",
            )
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                # All of it now: a write into a mapped file on a full disk would kill the process.
                os.posix_fallocate(file.fileno(), 0, self.size_bytes)
            temporary.replace(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(
                str(self.path),
                got=error.strerror or str(error),
                wanted=f"room for {self.size_bytes:,} bytes",
                remedy="name another disk with --cache-dir, or leave --cache-features out",
            ) from error


class CropCache:
    """Embeddings of a list of pictures as scoring sees them, that is of their centre crops; kept as the encoder gives
    them, so that runs with --standardize and without share them.

    Args:
        path: file to make, or to go on with.
        records: the pictures.
        width: of an embedding.

    Raises:
        ConfigError: the disk has no room for it.
    """

    def __init__(self, path: Path, records: Sequence[PictureRecord], *, width: int) -> None:
        self.records = records
        self._rows = FeatureCache(path, draws=1, pictures=len(records), width=width, views=1)

    def embeddings(self, model: EncodingModel, part: slice = slice(None), *, workers: int = 0) -> Tensor:
        """Embeddings e of `records[part]`, (n, d) float32 on the CPU; arguments as in `pooled`."""
        rows, standardizer = self.pooled(model, part, workers=workers), model.encoder.standardizer
        if isinstance(standardizer, nn.Identity) or not len(rows):
            return rows
        device = next(model.parameters()).device
        return torch.cat([standardizer(batch.to(device)).cpu() for batch in rows.split(BATCH_SIZE)])

    def pooled(self, model: EncodingModel, part: slice = slice(None), *, workers: int = 0) -> Tensor:
        """The same before they are standardised, in the batches that scoring has them in.

        Args:
            model: whose encoder is frozen, and in eval mode.
            part: of the records.
            workers: processes that decode what is not there yet.
        """
        keys = [Key(0, index) for index in range(len(self.records))[part]]
        batches = [keys[start : start + BATCH_SIZE] for start in range(0, len(keys), BATCH_SIZE)]
        missing = [batch for batch in batches if not self._rows.holds(0, batch)]
        if missing:
            records = [self.records[key.index] for batch in missing for key in batch]
            computed = embedded_batches(model, records, workers=workers, standardized=False)
            for batch, rows in zip(missing, computed, strict=True):
                self._rows.write(0, batch, rows)
        return self._rows.read(0, keys)[0]


@dataclass(frozen=True)
class StageCache:
    """What a stage keeps of the frozen encoder.

    Attributes:
        views: embeddings of the training views.
        crops: those of the pictures that are looked at after each epoch.
    """

    views: FeatureCache
    crops: CropCache


def _checksum(row: Any) -> int:
    """Checksum of a row, never 0, which marks a row that was not written."""
    return zlib.crc32(np.ascontiguousarray(row)) or 1
