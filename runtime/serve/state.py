"""What the requests of one server share: its service, its counters, and whether it takes work."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

import numpy as np
from PIL import Image

from runtime.batching import BatchObserver
from runtime.errors import BackendError, NTFError
from runtime.serve.admission import LatencyAdmission
from runtime.serve.metrics import ServerMetrics
from runtime.serve.request_errors import TOO_BUSY_REMEDY, RequestError, not_ready
from runtime.serve.settings import ServeSettings
from runtime.serve.workers import Workers
from runtime.service import DetectorService

ServiceLoader = Callable[[BatchObserver], DetectorService]

# Enough for the threads and caches of a first request, and for a mean.
_WARM_UP_PICTURES = 3
_WARM_UP_BURST = 8


class ServerState:
    """One server from its start to its end.

    Args:
        settings: of the server.
        load: opens the model; it gets the observer of its batches, and runs in a thread.
    """

    def __init__(self, settings: ServeSettings, load: ServiceLoader) -> None:
        limit_ms = settings.limits.max_latency_ms
        self.settings = settings
        self.metrics = ServerMetrics()
        self.admission = LatencyAdmission(None if limit_ms is None else limit_ms / 1000)
        self.phase: Literal["starting up", "ready", "shutting down"] = "starting up"
        self.requests_inside = 0
        self.failed: Future[None] = Future()
        self.workers = Workers()
        self._load = load
        self._service: DetectorService | None = None
        self._starting: asyncio.Future[None] | None = None
        self._watch()

    @property
    def service(self) -> DetectorService:
        """The service, also for what is still inside after the signal to stop.

        Raises:
            RequestError: 503 before it is opened.
        """
        if self._service is None:
            raise not_ready(self.phase)
        return self._service

    @property
    def opening(self) -> bool:
        """Whether the model is being opened and warmed, which nothing can interrupt."""
        return self._starting is not None and not self._starting.done()

    @property
    def natural_traces(self) -> bool:
        """Whether the model has a mean natural trace; one that was trained without has zeros in its place.

        Raises:
            RequestError: 503 before it is opened.
        """
        return any(self.service.manifest.mean_trace)

    def require_ready(self) -> None:
        """Nothing while the server takes work.

        Raises:
            RequestError: 503 while it starts and from the signal to stop on.
        """
        if self.phase != "ready":
            raise not_ready(self.phase)

    def begin(self) -> None:
        """Begins to open and warm the model; `failed` gets the error if that cannot be done."""
        self._starting = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        try:
            self._service = await asyncio.to_thread(self._load, self.metrics)
            await asyncio.to_thread(self._warm_up, self._service)
        except Exception as error:
            if not isinstance(error, NTFError):
                logging.getLogger(__name__).exception("the model could not be opened")
            self.failed.set_exception(error)
            return
        info = self._service.info
        self.metrics.model.labels(info.model, info.backend, info.precision, info.backend_version).set(1)
        if self.phase == "starting up":
            self.phase = "ready"

    def begin_to_stop(self) -> None:
        """From now on requests for work get 503, and /readyz as well; those inside go on."""
        self.phase = "shutting down"

    async def close(self) -> None:
        """Ends the service when what it works on is done."""
        self.begin_to_stop()
        if self._starting is not None:
            await self._starting
        if self._service is not None:
            await asyncio.to_thread(self._service.close)
        self.workers.close()

    def enter(self) -> None:
        """Counts a request for work in.

        Raises:
            RequestError: 503 where the server is not ready, 429 where it has too much to do.
        """
        self.require_ready()
        most = self.settings.limits.max_requests
        if self.requests_inside >= most:
            raise RequestError(
                "server", got=f"{most} requests before this one", wanted=f"at most {most} at once",
                remedy=TOO_BUSY_REMEDY, status=429, code="too_many_requests", retry_after_s=1,
            )  # fmt: skip
        self.admission.check()
        self.requests_inside += 1

    def leave(self) -> None:
        """Counts a request for work out."""
        self.requests_inside -= 1

    def _warm_up(self, service: DetectorService) -> None:
        service.warm_up()
        size = service.manifest.preprocess
        noise = np.random.default_rng(0).integers(0, 256, (2 * size.height, 2 * size.width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "JPEG")
        for _ in range(_WARM_UP_PICTURES):
            detection = service.submit(stream.getvalue()).result()
            if detection.error is not None:
                raise BackendError(
                    service.info.artifact,
                    got=detection.error,
                    wanted="a verdict on a picture of noise",
                    remedy="choose another precision or back-end, or export the model again",
                )
        # Only now: the first ones would make a picture alone look slower than it is.
        for _ in range(_WARM_UP_PICTURES):
            with self.admission.admitted(1):
                service.submit(stream.getvalue()).result()
        with self.admission.admitted(_WARM_UP_BURST):
            for future in [service.submit(stream.getvalue()) for _ in range(_WARM_UP_BURST)]:
                future.result()

    def _watch(self) -> None:
        watch, admission = self.metrics.watch, self.admission
        watch("ntf_requests_inside", "Requests for work that are not answered", lambda: self.requests_inside)
        watch("ntf_pictures_inside", "Pictures that are not answered", lambda: admission.inside)
        watch("ntf_queue_length", "Pictures that wait for the engine", self._queue_length)
        watch("ntf_expected_latency_seconds", "Of one more picture", lambda: admission.expected_latency_s)
        watch("ntf_latency_bound_seconds", "Beyond it, requests are refused", lambda: admission.bound_s or 0.0)
        watch("ntf_ready", "1 while the server takes work", lambda: float(self.phase == "ready"))

    def _queue_length(self) -> float:
        return 0.0 if self._service is None else self._service.queue_length
