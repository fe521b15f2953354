"""A detector that many threads, or an asyncio program, share: requests are collected into batches, within limits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.admission import Admission, closed_error
from runtime.arguments import require_duration, require_positive
from runtime.backends.base import Outputs
from runtime.batching import BatchObserver
from runtime.changes import Looks
from runtime.decode import PictureSource, describe_source
from runtime.detector import Detection, Detector, DetectorInfo, looks_of
from runtime.errors import ClosedError
from runtime.lane import Lane, WaitingCrop, WaitingPicture
from runtime.limits import MAX_PIXELS
from runtime.manifest import ModelManifest
from runtime.pipeline import BATCHES_AHEAD
from runtime.sources import require_many, source_name
from runtime.views import Views


class DetectorService:
    """A `Detector` behind a queue; made by `DetectorService.load`, closed by `close` or at the end of a `with` block.

    Pictures are decoded in threads, collected into batches and scored as soon as the engine is free.

    Note:
        Every method may be called from every thread at once. `predict`, `stream`, `close` and `swap` wait for
        pictures, so they are not for the callback of a future.
    """

    def __init__(
        self,
        detector: Detector,
        load_options: dict[str, Any],
        *,
        max_batch_size: int,
        max_wait_ms: float,
        max_queue: int,
        observer: BatchObserver | None,
    ) -> None:
        self._load_options = load_options
        self._max_batch_size = max_batch_size
        self._max_wait_ms = max_wait_ms
        self._observer = observer
        self._admission = Admission(max_queue)
        self._changing = threading.Lock()
        self._swapping = threading.Lock()
        self._closed = False
        self._lane = self._lane_of(detector)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        backend: str = "auto",
        precision: str = "auto",
        max_pixels: int = MAX_PIXELS,
        threads: int | None = None,
        check_golden: bool = False,
        max_batch_size: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 256,
        observer: BatchObserver | None = None,
        **load_options: Any,
    ) -> DetectorService:
        """Service of a model bundle, verified and opened.

        Args:
            model: folder or .zip file of the bundle.
            backend: as for `Detector.load`, and so are the next four.
            precision: "auto", "fp32", "fp16" or "int8".
            max_pixels: largest picture that is decoded, height times width.
            threads: CPU threads of one inference; None leaves it to the back-end.
            check_golden: run the golden inputs of the bundle first.
            max_batch_size: pictures scored at once at most; it does not change a score.
            max_wait_ms: how long a decoded picture waits for others while the engine is free, from 0.
            max_queue: pictures that may wait, decoded or not; further ones are refused.
            observer: told of each batch, for metrics.
            load_options: further ones of `Detector.load`.

        Raises:
            BundleError: as for `Detector.load`.
            BackendError: as for `Detector.load`.
            UsageError: a number is out of its range.
        """
        require_positive("max_batch_size", max_batch_size)
        require_positive("max_queue", max_queue)
        require_duration("max_wait_ms", max_wait_ms, zero=True)
        options: dict[str, Any] = {
            "backend": backend,
            "precision": precision,
            "max_pixels": max_pixels,
            "threads": threads,
            "check_golden": check_golden,
            "max_batch": max_batch_size,
            **load_options,
        }
        return cls(
            Detector.load(model, **options),
            options,
            max_batch_size=max_batch_size,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
            observer=observer,
        )

    @property
    def info(self) -> DetectorInfo:
        """What really runs, for the pictures that are submitted now."""
        return self._lane.detector.info

    @property
    def manifest(self) -> ModelManifest:
        """Manifest of the bundle that scores the pictures that are submitted now."""
        return self._lane.detector.manifest

    @property
    def queue_length(self) -> int:
        """Pictures that wait, decoded or not; those that the engine works on are not counted."""
        return self._admission.waiting

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(
        self,
        source: PictureSource,
        *,
        timeout_s: float | None = None,
        views: Views = "center",
        stability: bool = False,
    ) -> Future[Detection]:
        """Future of the verdict on one picture; a picture that cannot be read gives a Detection with `error` set.

        `cancel` takes the picture out of the queue, until the engine works on it.

        Args:
            source: as for `Detector.predict`; an array is copied before this returns, as far as it is looked at.
            timeout_s: seconds from now, after which the future raises DeadlineError.
            views: as for `Detector.predict`.
            stability: as for `Detector.predict`.

        Raises:
            QueueFullError: max_queue pictures wait already.
            ClosedError: the service is closed.
            UsageError: timeout_s is no positive number, or the views are unknown.
        """
        if timeout_s is not None:
            require_duration("timeout_s", timeout_s)
        return self._submit(
            WaitingPicture(describe_source(source), source, looks_of(views, stability)), timeout_s=timeout_s
        )

    def submit_crops(self, images: NDArray[np.uint8], *, timeout_s: float | None = None) -> list[Future[Outputs]]:
        """Futures of the raw outputs of the graph, one for each crop; they share batches with pictures.

        Args:
            images: (N, H, W, 3) uint8, H and W as in the manifest; copied before this returns.
            timeout_s: as for `submit`.

        Raises:
            QueueFullError: there is no room for all of them; none is taken then.
            ClosedError: the service is closed.
            UsageError: timeout_s is no positive number, or the images have another shape or type.
        """
        if timeout_s is not None:
            require_duration("timeout_s", timeout_s)
        futures: list[Future[Outputs]] = []
        try:
            futures.extend(self._submit(WaitingCrop(image), timeout_s=timeout_s) for image in np.array(images))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return futures

    async def detect(
        self,
        source: PictureSource,
        *,
        timeout_s: float | None = None,
        views: Views = "center",
        stability: bool = False,
    ) -> Detection:
        """The same for asyncio; cancelling the task takes the picture out of the queue.

        Args:
            source: as for `submit`.
            timeout_s: as for `submit`.
            views: as for `Detector.predict`.
            stability: as for `Detector.predict`.

        Raises:
            QueueFullError: max_queue pictures wait already.
            DeadlineError: timeout_s passed before the picture was scored.
            ClosedError: the service is closed, or was closed without draining it.
            BackendError: the back-end failed.
            UsageError: timeout_s is no positive number, or the views are unknown.
        """
        import asyncio  # loaded already where this runs, and not by importing this package elsewhere

        return await asyncio.wrap_future(self.submit(source, timeout_s=timeout_s, views=views, stability=stability))

    def predict(
        self, sources: Iterable[PictureSource], *, views: Views = "center", stability: bool = False
    ) -> list[Detection]:
        """One Detection for each source, in order; it waits where the queue is full.

        Args:
            sources: as for `Detector.predict`.
            views: as for `Detector.predict`.
            stability: as for `Detector.predict`.

        Raises:
            UsageError: a single picture instead of a list, or unknown views.
            ClosedError: the service is closed.
            BackendError: the back-end failed.
        """
        return list(self.stream(sources, views=views, stability=stability))

    def stream(
        self, sources: Iterable[PictureSource], *, views: Views = "center", stability: bool = False
    ) -> Iterator[Detection]:
        """The same as `predict`, but each Detection is handed out when it is there, and sources are taken as needed.

        Raises:
            UsageError: a single picture instead of a list, unknown views, or a call from the callback of a future.
            ClosedError: the service is closed.
            BackendError: the back-end failed.
        """
        self._lane.require_other_thread("stream")
        require_many(sources)
        return self._stream(sources, looks_of(views, stability))

    def swap(self, model: str | Path, **load_options: Any) -> None:
        """Changes to another bundle without losing a request.

        The new one is loaded, checked and warmed up while the old one works. Then it takes all new pictures, those
        that were submitted before end on the old one, and the old one is closed. Where anything fails, the old one
        stays.

        Args:
            model: folder or .zip file of the bundle.
            load_options: of `Detector.load`, in place of those that `load` was given.

        Raises:
            BundleError: as for `Detector.load`.
            BackendError: as for `Detector.load`.
            UsageError: an option makes no sense, or it is called from the callback of a future.
            ClosedError: the service is closed.
        """
        self._lane.require_other_thread("swap")
        with self._swapping:
            options = {**self._load_options, **load_options}
            lane = self._lane_of(self._warm_detector(model, options))
            with self._changing:
                closed = self._closed
                if not closed:
                    lane, self._lane, self._load_options = self._lane, lane, options
            lane.close(drain=True)  # the one that was replaced, or the new one where the service is closed
        if closed:
            raise closed_error()

    def warm_up(self) -> None:
        """Runs a batch of one picture and one of max_batch_size, so that the first request need not wait for it."""
        self._lane.detector.warm_up(1, self._max_batch_size)

    def close(self, *, drain: bool = True) -> None:
        """Ends the service: nothing new is taken, threads and back-end are released; may be called twice.

        Args:
            drain: score what waits first; otherwise its futures raise ClosedError. What the engine works on ends with
                its result in both cases.

        Raises:
            UsageError: called from the callback of a future.
        """
        self._lane.require_other_thread("close")
        with self._changing:
            self._closed = True
            self._admission.close()
        self._lane.close(drain=drain)
        with self._swapping:
            pass  # a swap that is under way ends the bundle that it has replaced

    def __enter__(self) -> DetectorService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info, state = self.info, ", closed" if self._closed else ""
        return f"<DetectorService {info.model}: {info.precision} on {info.backend}{state}>"

    def _warm_detector(self, model: str | Path, load_options: dict[str, Any]) -> Detector:
        detector = Detector.load(model, **load_options)
        try:
            detector.warm_up(1, self._max_batch_size)
        except BaseException:
            detector.close()
            raise
        return detector

    def _lane_of(self, detector: Detector) -> Lane:
        return Lane(
            detector,
            admission=self._admission,
            max_batch_size=self._max_batch_size,
            max_wait_ms=self._max_wait_ms,
            observer=self._observer,
        )

    def _submit(
        self, picture: WaitingPicture | WaitingCrop, *, timeout_s: float | None = None, block: bool = False
    ) -> Future[Any]:
        while True:
            lane = self._lane
            try:
                return lane.submit(picture, timeout_s=timeout_s, block=block)
            except ClosedError:
                # A lane is closed after another took its place, or for good.
                if lane is self._lane:
                    raise

    def _stream(self, sources: Iterable[PictureSource], looks: Looks) -> Iterator[Detection]:
        ahead = BATCHES_AHEAD * self._max_batch_size
        pending: deque[Future[Detection]] = deque()
        try:
            for index, source in enumerate(sources):
                pending.append(self._submit(WaitingPicture(source_name(source, index), source, looks), block=True))
                while pending and (len(pending) >= ahead or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
