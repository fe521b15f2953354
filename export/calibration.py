"""Calibration: which pictures, and how large every tensor of the graph gets on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from export.errors import ExportError
from export.graph import copy_of, model_bytes, with_outputs
from runtime.errors import PictureError
from runtime.manifest import INPUT_NAME
from runtime.preprocess import PreprocessSpec, prepare
from train.pictures import PictureRecord, PictureSet, load_pixels

# Against 256 pictures, the clipped ranges of lite0 then differ by 0 in the median and by 6 % at worst.
PICTURE_LIMIT = 128
# Whole feature maps of this many pictures are held at once: about 50 MB each for ResNet-50.
BATCH_SIZE = 4
HISTOGRAM_BINS = 2048

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
    count = len(validation.records)
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))
    subset = replace(validation, records=tuple(validation.records[i] for i in chosen))
    return PreparedPictures(subset, spec, subset.content_sha256())


def open_session(model: ModelProto) -> Any:
    """onnxruntime session on the CPU for looking inside a graph; scoring goes through `runtime.backends`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])


def largest_magnitudes(model: ModelProto, tensors: Iterable[str], batches: Batches) -> dict[str, float]:
    """Largest absolute value of each tensor over all pictures.

    Args:
        model: graph with the input `images`.
        tensors: names of float32 activations.
        batches: gives the pictures, afresh at each call.

    Raises:
        ExportError: a tensor is not finite on some picture.
    """
    names = list(tensors)
    session = open_session(_with_magnitudes(model, names))
    largest = np.zeros(len(names))
    for images in batches():
        found = session.run([f"{name}.magnitude" for name in names], {INPUT_NAME: images})
        largest = np.fmax(largest, np.array(found).reshape(-1))
        if not np.isfinite(np.array(found)).all():
            worst = names[int(np.argmin(np.isfinite(np.array(found)).reshape(-1)))]
            raise ExportError(
                f"tensor {worst}",
                got="infinity or NaN on a calibration picture",
                wanted="finite values",
                remedy="the trained weights are damaged; train again or use an earlier checkpoint",
            )
    return dict(zip(names, largest.tolist(), strict=True))


def magnitude_histograms(
    model: ModelProto, largest: dict[str, float], batches: Batches
) -> dict[str, NDArray[np.float64]]:
    """How often each magnitude occurs: HISTOGRAM_BINS counts from 0 to the tensor's largest magnitude.

    Args:
        model: graph with the input `images`.
        largest: largest magnitude by tensor name, from `largest_magnitudes`.
        batches: the same pictures.

    Note:
        Memory: the feature maps of one batch.
    """
    names = list(largest)
    session = open_session(with_outputs(model, names))
    counts = {name: np.zeros(HISTOGRAM_BINS) for name in names}
    for images in batches():
        for name, values in zip(names, session.run(names, {INPUT_NAME: images}), strict=True):
            scale = HISTOGRAM_BINS / max(largest[name], float(np.finfo(np.float32).tiny))
            bins = np.minimum(np.abs(values).ravel() * scale, HISTOGRAM_BINS - 1).astype(np.int32)
            counts[name] += np.bincount(bins, minlength=HISTOGRAM_BINS)
    return counts


def clipped_range(counts: NDArray[np.float64], largest: float, *, levels: int = 127) -> float:
    """Magnitude at which to clip so that rounding to `levels` steps and clipping lose least, in squared error.

    Args:
        counts: histogram of the magnitudes from 0 to `largest`.
        largest: upper edge of the last bin.
        levels: positive steps of the integer type.
    """
    if largest <= 0:
        return 1.0
    centers = (np.arange(len(counts)) + 0.5) * (largest / len(counts))
    shares = np.linspace(0.3, 1.0, 71)
    errors = []
    for share in shares:
        step = share * largest / levels
        rebuilt = np.minimum(np.round(centers / step), levels) * step
        errors.append(float(counts @ (rebuilt - centers) ** 2))
    return float(shares[int(np.argmin(errors))] * largest)


def _with_magnitudes(model: ModelProto, names: list[str]) -> ModelProto:
    seen = copy_of(model)
    for name in names:
        inner, outer = f"{name}.absolute", f"{name}.magnitude"
        seen.graph.node.append(onnx.helper.make_node("Abs", [name], [inner]))
        seen.graph.node.append(onnx.helper.make_node("ReduceMax", [inner], [outer], keepdims=0))
    return with_outputs(seen, [f"{name}.magnitude" for name in names])
