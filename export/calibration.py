"""Calibration pictures: a fixed, hashed list as the model sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError
from runtime.errors import PictureError
from runtime.preprocess import PreprocessSpec, prepare
from runtime.strict_json import canonical_json
from train.pictures import PictureRecord, PictureSet, load_pixels, relative_path

# Against 256 pictures, the clipped ranges of lite0 then differ by 0 in the median and by 6 % at worst.
PICTURE_LIMIT = 128
# Whole feature maps of this many pictures are held at once: about 50 MB each for ResNet-50.
BATCH_SIZE = 4

Batches = Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True)
class PreparedPictures:
    """A fixed list of labelled pictures as the model sees them.

    Attributes:
        pictures: the records, in the order of the collection.
        spec: preprocessing of the model they are for.
        sha256: of the relative paths, labels and bytes of the chosen files.
    """

    pictures: PictureSet
    spec: PreprocessSpec
    sha256: str

    def __len__(self) -> int:
        return len(self.pictures.records)

    def evenly_spaced(self, count: int) -> PreparedPictures:
        """At most `count` of them, at least 1, evenly spaced over the list, so over its generators and labels."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        subset = replace(self.pictures, records=tuple(self.pictures.records[i] for i in chosen))
        return PreparedPictures(subset, self.spec, subset.content_sha256())

    def listing(self) -> bytes:
        """The list as JSON: name, label and hash of each picture, and the hash of all; equal lists, equal bytes."""
        root = self.pictures.root
        entries = [
            {"name": relative_path(r.path, root), "label": r.label, "sha256": r.content_sha256()}
            for r in self.pictures.records
        ]
        return canonical_json({"pictures": entries, "sha256": self.sha256}).encode()

    def batches(self, size: int = BATCH_SIZE) -> Iterator[NDArray[np.uint8]]:
        """Prepared pictures (n, H, W, 3), n <= size, decoded when they are asked for.

        Raises:
            ExportError: a picture cannot be decoded; none is left out.
        """
        records = self.pictures.records
        for start in range(0, len(records), size):
            yield np.stack([self._prepared(record) for record in records[start : start + size]])

    def _prepared(self, record: PictureRecord) -> NDArray[np.uint8]:
        try:
            return prepare(load_pixels(record), self.spec)
        except PictureError as error:
            raise ExportError(
                f"picture {record.name}",
                got=error.got,
                wanted=error.wanted,
                remedy="remove or replace it; to leave it out silently would change what is measured",
            ) from error


def calibration_pictures(
    validation: PictureSet, spec: PreprocessSpec, *, limit: int = PICTURE_LIMIT
) -> PreparedPictures:
    """At most `limit` pictures, evenly spaced over the collection, so over its generators and labels.

    Args:
        validation: the run's validation pictures.
        spec: preprocessing of the model.
        limit: largest number of pictures, at least 1.
    """
    return PreparedPictures(validation, spec, "").evenly_spaced(limit)
