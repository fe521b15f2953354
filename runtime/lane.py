"""A lane: one opened bundle with its queue. A service has one, and puts another in its place when it swaps bundles."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.admission import Admission
from runtime.backends.base import Outputs
from runtime.batching import Answered, BatchObserver, DynamicBatcher
from runtime.changes import Looks
from runtime.decode import PictureSource
from runtime.detector import MAX_DECODE_THREADS, Detection, Detector, PreparedPicture, failed_detection
from runtime.errors import PictureError, UsageError
from runtime.sources import is_array, is_file


@dataclass(frozen=True)
class WaitingPicture:
    """A picture as it was handed in, with its name for people and how it is looked at."""

    name: str
    source: PictureSource
    looks: Looks


@dataclass(frozen=True)
class WaitingCrop:
    """What the graph takes, handed in as it is; its raw outputs are wanted."""

    image: NDArray[np.uint8]


_Item: TypeAlias = WaitingPicture | PreparedPicture | WaitingCrop
_Ready: TypeAlias = PreparedPicture | WaitingCrop


class Lane:
    """One opened bundle with its queue: a swap puts another lane in its place.

    Args:
        detector: that scores; closed with the lane.
        admission: counts what waits, over every lane of a service.
        max_batch_size: pictures scored at once at most.
        max_wait_ms: how long a decoded picture waits for others while the engine is free.
        observer: told of each batch.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        admission: Admission,
        max_batch_size: int,
        max_wait_ms: float,
        observer: BatchObserver | None,
    ) -> None:
        self.detector = detector
        self._max_batch_size = max_batch_size
        # One image or stream that is submitted twice must not be decoded twice at the same time.
        self._one_at_a_time = threading.Lock()
        self._batcher = DynamicBatcher[_Item, _Ready, Detection | Outputs](
            self._prepare,
            self._score,
            admission=admission,
            max_batch_size=max_batch_size,
            max_wait_ms=max_wait_ms,
            prepare_threads=min(MAX_DECODE_THREADS, os.cpu_count() or 1),
            observer=observer,
        )

    def submit(
        self, picture: WaitingPicture | WaitingCrop, *, timeout_s: float | None, block: bool
    ) -> Future[Detection | Outputs]:
        """Future of a Detection for a picture, of raw outputs for a crop.

        Args:
            picture: what is asked about.
            timeout_s: seconds from now, after which the future raises DeadlineError; None waits for ever.
            block: wait for a place in the queue where there is none.

        Raises:
            QueueFullError: the queue is full, and `block` is false.
            ClosedError: the lane is closed.
            UsageError: a crop has another shape or type.
        """
        item: _Item = picture
        if isinstance(picture, WaitingCrop):
            self._require_crop(picture.image)
        elif is_array(picture.source):
            # An array needs no decoding, and its owner may fill it anew as soon as this returns.
            item = self._read(picture)
        return self._batcher.submit(item, timeout_s=timeout_s, block=block)

    def require_other_thread(self, action: str) -> None:
        """As `DynamicBatcher.require_other_thread`."""
        self._batcher.require_other_thread(action)

    def close(self, *, drain: bool) -> None:
        """Ends the queue as `DynamicBatcher.close` does, then the detector."""
        self._batcher.close(drain=drain)
        self.detector.close()

    def _require_crop(self, image: NDArray[np.uint8]) -> None:
        size = self.detector.manifest.preprocess
        if image.dtype != np.uint8 or image.shape != (size.height, size.width, 3):
            raise UsageError(
                "crop",
                got=f"{image.dtype} {image.shape}",
                wanted=f"uint8 {(size.height, size.width, 3)}",
                remedy="crop pictures as the model does, with runtime.prepare",
            )

    def _prepare(self, picture: _Item) -> _Ready | Answered[Detection | Outputs]:
        if isinstance(picture, WaitingCrop):
            return picture
        read = picture if isinstance(picture, PreparedPicture) else self._read(picture)
        if isinstance(read.crops, PictureError):
            return Answered(failed_detection(read.name, read.crops))
        return read

    def _read(self, picture: WaitingPicture) -> PreparedPicture:
        shared = not (is_file(picture.source) or is_array(picture.source))
        with self._one_at_a_time if shared else nullcontext():
            return self.detector.prepare(picture.source, name=picture.name, looks=picture.looks)

    def _score(self, batch: list[_Ready]) -> list[Detection | Outputs]:
        pictures = [one for one in batch if not isinstance(one, WaitingCrop)]
        crops = [one.image for one in batch if isinstance(one, WaitingCrop)]
        detections = iter(self.detector.score(pictures, batch_size=self._max_batch_size))
        outputs = iter(_rows(self.detector.infer(np.stack(crops))) if crops else ())
        return [next(outputs) if isinstance(one, WaitingCrop) else next(detections) for one in batch]


def _rows(outputs: Outputs) -> list[Outputs]:
    """Outputs of one batch as batches of one."""
    return [Outputs(*(array[row : row + 1] for array in outputs)) for row in range(len(outputs.logits))]
