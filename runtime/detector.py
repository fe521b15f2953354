"""Pictures in, verdicts out: the embedded API."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.arguments import require_positive
from runtime.backends import Backend, Outputs, open_backend
from runtime.backends.choice import Choice, choose
from runtime.bundle import Bundle, open_bundle
from runtime.changes import CHANGES, UNCHANGED, Looks, picture_crops
from runtime.decode import PictureSource
from runtime.errors import BackendError, NTFError, PictureError, UsageError
from runtime.golden import require_golden
from runtime.limits import MAX_PIXELS
from runtime.pipeline import pipelined
from runtime.sources import is_array, is_file, require_many, source_name
from runtime.stability import Stability, stability_of
from runtime.views import Views, require_views

Verdict: TypeAlias = Literal["real", "uncertain", "fake"]

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
        stability: how far the score moves when the picture is changed; None where that was not asked for.
        cause: the error of which `error` is the text, for programs that tell errors apart.
    """

    source: str
    fake_probability: float | None
    verdict: Verdict | None
    trace_similarity: float | None
    evidence: NDArray[np.float32] | None
    error: str | None
    stability: Stability | None = None
    cause: NTFError | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary of all fields but `cause`, ready for `json.dumps`; evidence as rows of numbers."""
        evidence = self.evidence
        rows = None if evidence is None else np.round(evidence.astype(np.float64), _EVIDENCE_DECIMALS).tolist()
        return {
            "source": self.source,
            "fake_probability": self.fake_probability,
            "verdict": self.verdict,
            "trace_similarity": self.trace_similarity,
            "evidence": rows,
            "error": self.error,
            "stability": None if self.stability is None else self.stability.to_json(),
        }


class PreparedPicture(NamedTuple):
    """A picture as the graph takes it.

    name is for people; crops are (H, W, 3) uint8, in the order of `runtime.changes.picture_crops`, or the error that
    says why there are none.
    """

    name: str
    looks: Looks
    crops: list[NDArray[np.uint8]] | PictureError


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
        hint: str | None = None,
        cuda_graphs: bool = False,
        max_batch: int | None = None,
        check_golden: bool = False,
    ) -> Detector:
        """Detector of a model bundle, verified and opened.

        Args:
            model: folder or .zip file of the bundle; a .zip is read in memory and never unpacked.
            backend: "auto", or one of `runtime.backends.BACKENDS`, which then runs or fails.
            precision: "auto", "fp32", "fp16" or "int8".
            max_pixels: largest picture that is decoded, height times width.
            threads: CPU threads of one inference; None leaves it to the back-end.
            hint: "latency" (the default) or "throughput": several inferences at once, for "trt" and "openvino".
            cuda_graphs: launch each batch size as a CUDA graph, for "trt".
            max_batch: largest batch that will be asked for: "auto" passes over what cannot take it, and what was named
                is refused now, and not when the batch comes.
            check_golden: run the golden inputs of the bundle first, and refuse a back-end that gives other outputs.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema, or has no golden inputs to check.
            BackendError: what was asked for cannot run here, or gives wrong outputs; nothing else is taken in its
                place.
            UsageError: max_pixels, threads or max_batch is no positive whole number, or the back-end lacks an option.
        """
        require_positive("max_pixels", max_pixels)
        if threads is not None:
            require_positive("threads", threads)
        if max_batch is not None:
            require_positive("max_batch", max_batch)
        bundle = open_bundle(model)
        choice = choose(bundle.manifest, backend=backend, precision=precision, max_batch=max_batch)
        artifact = choice.artifact
        opened = open_backend(
            choice.backend, bundle.read(artifact), bundle.manifest, file=artifact.file, threads=threads, hint=hint,
            cuda_graphs=cuda_graphs, max_batch=max_batch,
        )  # fmt: skip
        if check_golden:
            try:
                require_golden(bundle, opened, artifact.precision)
            except BaseException:
                opened.close()
                raise
        return cls(bundle, opened, choice, max_pixels=max_pixels)

    def predict(
        self,
        sources: Iterable[PictureSource],
        *,
        batch_size: int = 32,
        views: Views = "center",
        stability: bool = False,
    ) -> list[Detection]:
        """One Detection for each source, in order; a picture that cannot be read gets one with `error` set.

        Args:
            sources: paths, bytes of files, binary file objects, Pillow images and uint8 (H, W, 3) RGB arrays, of NumPy
                or with DLPack, in any mixture. A single picture goes in a list: `predict([picture])`.
            batch_size: crops scored at once; it bounds memory and does not change a score.
            views: parts of a picture that are looked at, "center", "five" or "grid" as `runtime.views.view_anchors`
                has them. Their logits and similarities are averaged before the calibration, whose thresholds were
                fitted on the middle alone; `evidence` is that of the middle.
            stability: score each picture re-encoded and rescaled as well (`runtime.changes.CHANGES`). A verdict that
                is another one on a changed picture becomes "uncertain"; the other numbers are the unchanged picture's.

        Raises:
            UsageError: a single picture instead of a list, a bad batch_size, unknown views, or the detector is closed.
        """
        return list(self.stream(sources, batch_size=batch_size, views=views, stability=stability))

    def stream(
        self,
        sources: Iterable[PictureSource],
        *,
        batch_size: int = 32,
        views: Views = "center",
        stability: bool = False,
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
        return self._stream(sources, batch_size, looks_of(views, stability))

    def prepare(self, source: PictureSource, *, name: str, looks: Looks) -> PreparedPicture:
        """A picture as the graph takes it: the first half of `predict`.

        Args:
            source: as for `predict`.
            name: of the picture, for people.
            looks: how it is looked at, from `looks_of`.
        """
        try:
            crops = picture_crops(source, self.manifest.preprocess, looks, max_pixels=self._max_pixels)
        except PictureError as error:
            return PreparedPicture(name, looks, error)
        # Whoever hands in an array may fill it anew while the crops wait for the back-end.
        return PreparedPicture(name, looks, [crop.copy() for crop in crops] if is_array(source) else crops)

    def score(self, pictures: Sequence[PreparedPicture], *, batch_size: int = 32) -> list[Detection]:
        """Detections of prepared pictures: the second half of `predict`.

        Args:
            pictures: from `prepare`; only those that could be read go to the back-end.
            batch_size: crops scored at once; it does not change a score.

        Raises:
            UsageError: the detector is closed.
            BackendError: the back-end failed.
        """
        crops = [crop for picture in pictures if not isinstance(picture.crops, PictureError) for crop in picture.crops]
        with self._using_backend() as backend:
            outputs = _inferred(backend, crops, batch_size) if crops else None
        first, detections = 0, []
        for name, looks, found in pictures:
            if isinstance(found, PictureError):
                detections.append(failed_detection(name, found))
            else:
                assert outputs is not None  # there is a crop
                rows = slice(first, first + len(found))
                first = rows.stop
                detections.append(self._detection(name, Outputs(*(array[rows] for array in outputs)), looks))
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

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Raw outputs of the graph, not calibrated.

        Args:
            images: (N, H, W, 3) uint8 from `prepare`, N from 1.

        Raises:
            UsageError: the detector is closed.
            BackendError: the back-end failed.
        """
        with self._using_backend() as backend:
            return backend.infer(images)

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

    def _stream(self, sources: Iterable[PictureSource], batch_size: int, looks: Looks) -> Iterator[Detection]:
        def score(begun: list[PreparedPicture | Future[PreparedPicture]]) -> list[Detection]:
            return self.score([self._prepared(picture) for picture in begun], batch_size=batch_size)

        pictures = max(1, batch_size // looks.most_crops)
        begin = partial(self._begin_preparing, looks)
        for detection in pipelined(enumerate(sources), begin, score, batch_size=pictures):
            self._opened()
            yield detection

    def _begin_preparing(
        self, looks: Looks, numbered: tuple[int, PictureSource]
    ) -> PreparedPicture | Future[PreparedPicture]:
        index, source = numbered
        name = source_name(source, index)
        self._opened()
        if is_file(source):
            return self._pool.submit(self.prepare, source, name=name, looks=looks)
        return self.prepare(source, name=name, looks=looks)

    def _prepared(self, begun: PreparedPicture | Future[PreparedPicture]) -> PreparedPicture:
        try:
            return begun.result() if isinstance(begun, Future) else begun
        except CancelledError:
            self._opened()  # `close` gave up what was not yet begun
            raise

    def _detection(self, name: str, outputs: Outputs, looks: Looks) -> Detection:
        """Detection of one source.

        Args:
            name: of the source.
            outputs: of its crops alone, in the order of `prepare`.
            looks: as `prepare` was told.
        """
        changes = len(looks.changes)
        # Over the views of each change, in float64: the mean of one value is that value.
        logits = outputs.logits.astype(np.float64).reshape(changes, -1).mean(axis=1)
        similarities = outputs.trace_similarity.astype(np.float64).reshape(changes, -1).mean(axis=1)
        evidence = self._calibration.calibrated(outputs.evidence[0]).astype(np.float32)
        if not all(np.isfinite(values).all() for values in (logits, similarities, evidence)):
            error = BackendError(
                name,
                got="a score that is not a finite number",
                wanted="finite outputs",
                remedy=f"choose another precision than {self.info.precision}, and report the picture",
            )
            return failed_detection(name, error)
        probabilities, verdicts = self._calibration.fake_probability(logits), self._calibration.verdicts(logits)
        found = stability_of(looks.changes, probabilities, verdicts) if changes > 1 else None
        return Detection(
            source=name,
            fake_probability=float(probabilities[0]),
            verdict=_verdict("uncertain" if found is not None and found.flips else str(verdicts[0])),
            trace_similarity=float(similarities[0]),
            evidence=evidence,
            error=None,
            stability=found,
        )


def looks_of(views: Views, stability: bool) -> Looks:
    """How pictures are looked at, by the arguments of `Detector.predict`.

    Raises:
        UsageError: unknown views.
    """
    return Looks(require_views(views), CHANGES if stability else UNCHANGED)


def _inferred(backend: Backend, crops: list[NDArray[np.uint8]], batch_size: int) -> Outputs:
    """Outputs of one or more crops, at most `batch_size` at once."""
    batches = [backend.infer(np.stack(crops[first : first + batch_size])) for first in range(0, len(crops), batch_size)]
    return batches[0] if len(batches) == 1 else Outputs(*map(np.concatenate, zip(*batches, strict=True)))


def failed_detection(name: str, error: NTFError) -> Detection:
    """Detection of a picture without a verdict."""
    return Detection(name, None, None, None, None, str(error), cause=error)


def _verdict(text: str) -> Verdict:
    verdicts: dict[str, Verdict] = {"real": "real", "uncertain": "uncertain", "fake": "fake"}
    return verdicts[text]
