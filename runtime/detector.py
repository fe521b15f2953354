"""Pictures in, verdicts out: the embedded API."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.arguments import require_positive
from runtime.backends import Backend, Outputs, open_backend
from runtime.backends.choice import Choice, choose
from runtime.bundle import Bundle, open_bundle
from runtime.decode import MAX_PIXELS, PictureSource
from runtime.errors import PictureError, UsageError
from runtime.golden import require_golden
from runtime.pipeline import pipelined
from runtime.sources import is_array, is_file, require_many, source_name
from runtime.views import Views, require_views, view_crops

Verdict: TypeAlias = Literal["real", "uncertain", "fake"]

# What the graph takes of a picture: one crop (H, W, 3) uint8 or more, or why it cannot be read.
Prepared: TypeAlias = "list[NDArray[np.uint8]] | PictureError"

# Each decoding thread may hold one picture of max_pixels in memory, so there are few.
MAX_DECODE_THREADS = 4
# Evidence is for looking at; five decimals of a logit are more than a picture can show.
_EVIDENCE_DECIMALS = 5


@dataclass(frozen=True, eq=False)
class Detection:
    """What the detector says about one picture; either `error` is None or all the numbers are.

    Args:
        source: path or description of the picture.
        fake_probability: calibrated probability of being generated, 0 to 1.
        verdict: "real", "uncertain" or "fake", by the thresholds in the manifest.
        trace_similarity: cosine with the mean natural trace, -1 to 1; natural pictures are near it.
        evidence: (h, w) float32 calibrated logit of each cell of the crop that was looked at; above 0 is fake.
        error: why there is no verdict, in one sentence.
    """

    source: str
    fake_probability: float | None
    verdict: Verdict | None
    trace_similarity: float | None
    evidence: NDArray[np.float32] | None
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with the same field names, ready for `json.dumps`; evidence as rows of numbers."""
        evidence = self.evidence
        rows = None if evidence is None else np.round(evidence.astype(np.float64), _EVIDENCE_DECIMALS).tolist()
        return {
            "source": self.source,
            "fake_probability": self.fake_probability,
            "verdict": self.verdict,
            "trace_similarity": self.trace_similarity,
            "evidence": rows,
            "error": self.error,
        }


@dataclass(frozen=True)
class DetectorInfo:
    """What really runs.

    Args:
        model: name of the model.
        location: folder or .zip file of the bundle.
        backend: name of the back-end.
        backend_version: of its package.
        device: that it runs on.
        precision: of the graph.
        artifact: file name of the graph.
        reason: why this back-end and this precision.
    """

    model: str
    location: str
    backend: str
    backend_version: str
    device: str
    precision: str
    artifact: str
    reason: str


class Detector:
    """A model opened on one back-end; made by `Detector.load`, closed by `close` or at the end of a `with` block.

    Note:
        `predict` may be called from several threads at once.
    """

    def __init__(self, bundle: Bundle, backend: Backend, choice: Choice, *, max_pixels: int) -> None:
        self.manifest = bundle.manifest
        self.info = DetectorInfo(
            model=bundle.manifest.name,
            location=str(bundle.location),
            backend=backend.name,
            backend_version=backend.version,
            device=backend.device,
            precision=choice.artifact.precision,
            artifact=choice.artifact.file,
            reason=choice.reason,
        )
        self._backend: Backend | None = backend
        self._calibration = bundle.manifest.calibration[choice.artifact.precision]
        self._max_pixels = max_pixels
        self._users = 0
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(min(MAX_DECODE_THREADS, os.cpu_count() or 1), "ntf-decode")

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
    ) -> Detector:
        """Detector of a model bundle, verified and opened.

        Args:
            model: folder or .zip file of the bundle; a .zip is read in memory and never unpacked.
            backend: "auto", or one of `runtime.backends.BACKENDS`, which then runs or fails.
            precision: "auto", "fp32", "fp16" or "int8".
            max_pixels: largest picture that is decoded, height times width.
            threads: CPU threads of one inference; None leaves it to the back-end.
            check_golden: run the golden inputs of the bundle first, and refuse a back-end that gives other outputs.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema, or has no golden inputs to check.
            BackendError: what was asked for cannot run here, or gives wrong outputs; nothing else is taken in its
                place.
            UsageError: max_pixels or threads is not a positive whole number.
        """
        require_positive("max_pixels", max_pixels)
        if threads is not None:
            require_positive("threads", threads)
        bundle = open_bundle(model)
        choice = choose(bundle.manifest, backend=backend, precision=precision)
        artifact = choice.artifact
        opened = open_backend(
            choice.backend, bundle.read(artifact), bundle.manifest, file=artifact.file, threads=threads
        )
        if check_golden:
            try:
                require_golden(bundle, opened, artifact.precision)
            except BaseException:
                opened.close()
                raise
        return cls(bundle, opened, choice, max_pixels=max_pixels)

    def predict(
        self, sources: Iterable[PictureSource], *, batch_size: int = 32, views: Views = "center"
    ) -> list[Detection]:
        """One Detection for each source, in order; a picture that cannot be read gets one with `error` set.

        Args:
            sources: paths, bytes of files, binary file objects, Pillow images and uint8 (H, W, 3) RGB arrays, of NumPy
                or with DLPack, in any mixture. A single picture goes in a list: `predict([picture])`.
            batch_size: pictures read at once, and crops scored at once; it bounds memory and does not change a score.
            views: parts of a picture that are looked at, "center", "five" or "grid" as `runtime.views.view_parts`
                has them. Their logits and similarities are averaged before the calibration, whose thresholds were
                fitted on the middle alone; `evidence` is that of the middle.

        Raises:
            UsageError: a single picture instead of a list, a bad batch_size, unknown views, or the detector is closed.
        """
        return list(self.stream(sources, batch_size=batch_size, views=views))

    def stream(
        self, sources: Iterable[PictureSource], *, batch_size: int = 32, views: Views = "center"
    ) -> Iterator[Detection]:
        """The same as `predict`, but each batch is handed out when it is done, and sources are taken as needed.

        Files are decoded in threads while the back-end works on the batches before. At most three batches are read
        ahead, so memory does not grow with the number of sources. Where taking a source fails, the Detections of
        those before it come first, then the error.

        Raises:
            UsageError: a single picture instead of a list, a bad batch_size, unknown views, or the detector is closed.
        """
        require_positive("batch_size", batch_size)
        require_many(sources)
        self._opened()
        return self._stream(sources, batch_size, require_views(views))

    def prepare(self, source: PictureSource, *, views: Views = "center") -> Prepared:
        """Model inputs of one picture, or why it cannot be read: the first half of `predict`.

        Args:
            source: as for `predict`.
            views: as for `predict`; there is at least one view, and the middle is the first.
        """
        try:
            crops = view_crops(source, self.manifest.preprocess, views, max_pixels=self._max_pixels)
        except PictureError as error:
            return error
        # Whoever hands in an array may fill it anew while the crops wait for the back-end.
        return [crop.copy() for crop in crops] if is_array(source) else crops

    def score(self, names: Sequence[str], prepared: Sequence[Prepared], *, batch_size: int = 32) -> list[Detection]:
        """Detections of prepared pictures: the second half of `predict`.

        Args:
            names: of the pictures, for people.
            prepared: what `prepare` returned for each of them; only crops go to the back-end.
            batch_size: crops scored at once; it does not change a score.

        Raises:
            UsageError: the detector is closed.
            BackendError: the back-end failed.
        """
        crops = [crop for found in prepared if not isinstance(found, PictureError) for crop in found]
        with self._using_backend() as backend:
            outputs = _inferred(backend, crops, batch_size) if crops else None
        first, detections = 0, []
        for name, found in zip(names, prepared, strict=True):
            if isinstance(found, PictureError) or outputs is None:
                detections.append(failed_detection(name, str(found)))
            else:
                rows = slice(first, first + len(found))
                first = rows.stop
                detections.append(self._detection(name, Outputs(*(array[rows] for array in outputs))))
        return detections

    def warm_up(self, *batch_sizes: int) -> None:
        """Scores black pictures, so that the back-end has allocated what it needs.

        Args:
            batch_sizes: pictures in each batch.

        Raises:
            UsageError: a batch size is not a positive whole number, or the detector is closed.
            BackendError: the back-end failed.
        """
        size = self.manifest.preprocess
        for batch_size in batch_sizes:
            require_positive("batch size", batch_size)
            with self._using_backend() as backend:
                backend.infer(np.zeros((batch_size, size.height, size.width, 3), np.uint8))

    def close(self) -> None:
        """Releases the back-end, once nothing is inferred any more, and the decoding threads; may be called twice."""
        with self._idle:
            backend, self._backend = self._backend, None
            while self._users:
                self._idle.wait()
        if backend is not None:
            self._pool.shutdown(cancel_futures=True)
            backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._backend is not None else ", closed"
        return f"<Detector {self.info.model}: {self.info.precision} on {self.info.backend}{state}>"

    def _opened(self) -> Backend:
        if self._backend is None:
            raise UsageError("detector", got="a closed one", wanted="an open one", remedy="load it again")
        return self._backend

    @contextmanager
    def _using_backend(self) -> Iterator[Backend]:
        """The back-end, which is not closed meanwhile."""
        with self._idle:
            backend = self._opened()
            self._users += 1
        try:
            yield backend
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def _stream(self, sources: Iterable[PictureSource], batch_size: int, views: Views) -> Iterator[Detection]:
        def begin(numbered: tuple[int, PictureSource]) -> tuple[str, Prepared | Future[Prepared]]:
            index, source = numbered
            return source_name(source, index), self._begin_preparing(source, views)

        def score(begun: list[tuple[str, Prepared | Future[Prepared]]]) -> list[Detection]:
            prepared = [self._prepared(found) for _, found in begun]
            return self.score([name for name, _ in begun], prepared, batch_size=batch_size)

        for detection in pipelined(enumerate(sources), begin, score, batch_size=batch_size):
            self._opened()
            yield detection

    def _begin_preparing(self, source: PictureSource, views: Views) -> Prepared | Future[Prepared]:
        self._opened()
        if is_file(source):
            return self._pool.submit(self.prepare, source, views=views)
        return self.prepare(source, views=views)

    def _prepared(self, begun: Prepared | Future[Prepared]) -> Prepared:
        try:
            return begun.result() if isinstance(begun, Future) else begun
        except CancelledError:
            self._opened()  # `close` gave up what was not yet begun
            raise

    def _detection(self, name: str, outputs: Outputs) -> Detection:
        """Detection of one source.

        Args:
            name: of the source.
            outputs: of its crops alone, in the order of `prepare`.
        """
        # In float64: the mean of one value is that value.
        logit = float(outputs.logits.astype(np.float64).mean())
        similarity = float(outputs.trace_similarity.astype(np.float64).mean())
        evidence = self._calibration.calibrated(outputs.evidence[0]).astype(np.float32)
        if not (np.isfinite(logit) and np.isfinite(similarity) and np.isfinite(evidence).all()):
            error = PictureError(
                name,
                got="a score that is not a finite number",
                wanted="finite outputs",
                remedy=f"choose another precision than {self.info.precision}, and report the picture",
            )
            return failed_detection(name, str(error))
        return Detection(
            source=name,
            fake_probability=float(self._calibration.fake_probability(logit)),
            verdict=_verdict(str(self._calibration.verdicts(logit))),
            trace_similarity=similarity,
            evidence=evidence,
            error=None,
        )


def _inferred(backend: Backend, crops: list[NDArray[np.uint8]], batch_size: int) -> Outputs:
    """Outputs of one or more crops, at most `batch_size` at once."""
    batches = [backend.infer(np.stack(crops[first : first + batch_size])) for first in range(0, len(crops), batch_size)]
    return batches[0] if len(batches) == 1 else Outputs(*map(np.concatenate, zip(*batches, strict=True)))


def failed_detection(name: str, error: str) -> Detection:
    """Detection of a picture without a verdict."""
    return Detection(name, None, None, None, None, error)


def _verdict(text: str) -> Verdict:
    verdicts: dict[str, Verdict] = {"real": "real", "uncertain": "uncertain", "fake": "fake"}
    return verdicts[text]
