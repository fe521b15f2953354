"""A frozen encoder's embeddings by the pixels that it saw, on disk, for all stages, runs and evaluations that share it.

`train.feature_cache` knows the views of one run by their number and needs no pixels; here a view is known by its bytes,
so that the centre crop that a training view happens to be, a validation picture and another run's view are one entry.
An embedding is kept in parts, one for the encoder's output and one for each depth: a run that joins fewer depths reads
what one with more has computed. A row may differ in its last bits from one computed in a batch of another size.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from train.errors import TrainingError

if TYPE_CHECKING:
    from train.encoder import Encoder

FILE = "embeddings-{weights}.sqlite"
_WAIT_SECONDS = 60.0  # for another process that writes


class EmbeddingStore:
    """Embeddings in one SQLite file, which several processes may read and write.

    Args:
        folder: made where it is not there.
        weights: hash of the encoder's weights; each has its own file.

    Raises:
        TrainingError: the file cannot be opened or is damaged.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.path = folder / FILE.format(weights=weights[:32])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_WAIT_SECONDS)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS rows (pixels BLOB, part TEXT, row BLOB, PRIMARY KEY (pixels, part))"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def embed(self, encoder: Encoder, normalizer: nn.Module, images: Tensor) -> Tensor:
        """What the encoder makes of raw images (N, H, W, 3) uint8: (N, d) on their device.

        Images that are not there yet are computed, and kept.

        Args:
            encoder: frozen, with the weights of this store.
            normalizer: takes images to the encoder's pixels.
            images: raw.

        Raises:
            TrainingError: the file cannot be read or written.
        """
        names = [_part(name, images.device.type) for name in encoder.part_names()]
        keys = [_digest(image) for image in images.cpu().numpy()]
        known = self._read(keys, names)
        missing = [index for index, key in enumerate(keys) if key not in known]
        if missing:
            parts = encoder.parts(normalizer(images[missing]))
            computed = [values.float().cpu().numpy() for values in parts]
            fresh = {keys[index]: [values[row] for values in computed] for row, index in enumerate(missing)}
            self._write(fresh, names)
            known |= fresh
        rows = np.stack([np.concatenate(known[key]) for key in keys])
        return torch.from_numpy(rows).to(images.device)

    def _read(self, keys: Sequence[bytes], names: Sequence[str]) -> dict[bytes, list[np.ndarray]]:
        """The keys of which every part is there."""
        found: dict[bytes, dict[str, np.ndarray]] = {}
        query = f"SELECT pixels, part, row FROM rows WHERE pixels IN ({','.join('?' * len(keys))})"
        try:
            for key, part, row in self._database.execute(query, list(keys)):
                found.setdefault(key, {})[part] = np.frombuffer(row, np.float32)
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return {key: [parts[name] for name in names] for key, parts in found.items() if parts.keys() >= set(names)}

    def _write(self, rows: dict[bytes, list[np.ndarray]], names: Sequence[str]) -> None:
        entries = [
            (key, name, np.ascontiguousarray(value, np.float32).tobytes())
            for key, values in rows.items()
            for name, value in zip(names, values, strict=True)
        ]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", entries)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TrainingError:
        return TrainingError(
            str(self.path),
            got=str(error),
            wanted="a file of embeddings that can be read and written",
            remedy="free some space, delete the file, which is computed again, or name another folder with --cache-dir",
        )


def _digest(image: np.ndarray) -> bytes:
    """Of the pixels and the shape of one image."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()


def _part(name: str, device: str) -> str:
    """Name of a part and of the arithmetic that made it."""
    return f"{name} {torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else name
