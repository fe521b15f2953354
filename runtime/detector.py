"""Pictures in, verdicts out: the embedded API."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.backends import Backend, Outputs, open_backend
from runtime.backends.choice import Choice, choose
from runtime.bundle import Bundle, open_bundle
from runtime.decode import MAX_PIXELS, PictureSource, decode_picture, describe_source
from runtime.errors import PictureError, UsageError
from runtime.golden import require_golden
from runtime.preprocess import prepare

Verdict: TypeAlias = Literal["real", "uncertain", "fake"]

# Each decoding thread may hold one picture of max_pixels in memory, so there are few.
_MAX_DECODE_THREADS = 4
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
        self._pool = ThreadPoolExecutor(min(_MAX_DECODE_THREADS, os.cpu_count() or 1), "ntf-decode")

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
            max_batch: largest batch that will be asked for; what cannot take it is refused now, and not when it comes.
            check_golden: run the golden inputs of the bundle first, and refuse a back-end that gives other outputs.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema, or has no golden inputs to check.
            BackendError: what was asked for cannot run here, or gives wrong outputs; nothing else is taken in its
                place.
            UsageError: max_pixels, threads or max_batch is no positive whole number, or the back-end lacks an option.
        """
        _require_positive("max_pixels", max_pixels)
        if threads is not None:
            _require_positive("threads", threads)
        if max_batch is not None:
            _require_positive("max_batch", max_batch)
        bundle = open_bundle(model)
        choice = choose(bundle.manifest, backend=backend, precision=precision)
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

    def predict(self, sources: Iterable[PictureSource], *, batch_size: int = 32) -> list[Detection]:
        """One Detection for each source, in order; a picture that cannot be read gets one with `error` set.

        Args:
            sources: paths, bytes of files, binary file objects, Pillow images and uint8 (H, W, 3) RGB arrays, in
                any mixture. A single picture goes in a list: `predict([picture])`.
            batch_size: pictures scored at once; it bounds memory and does not change a score.

        Raises:
            UsageError: a single picture instead of a list, a bad batch_size, or the detector is closed.
        """
        return list(self.stream(sources, batch_size=batch_size))

    def stream(self, sources: Iterable[PictureSource], *, batch_size: int = 32) -> Iterator[Detection]:
        """The same as `predict`, but each batch is handed out when it is done, and sources are taken as needed.

        Raises:
            UsageError: a single picture instead of a list, a bad batch_size, or the detector is closed.
        """
        _require_positive("batch_size", batch_size)
        _require_many(sources)
        self._opened()
        return self._stream(iter(sources), batch_size)

    def close(self) -> None:
        """Releases the back-end and the decoding threads; may be called twice."""
        if self._backend is not None:
            self._pool.shutdown(cancel_futures=True)
            self._backend.close()
            self._backend = None

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

    def _stream(self, sources: Iterator[PictureSource], batch_size: int) -> Iterator[Detection]:
        first = 0
        while batch := list(islice(sources, batch_size)):
            names = [_source_name(source, first + index) for index, source in enumerate(batch)]
            yield from self._detect(names, batch)
            first += len(batch)

    def _detect(self, names: list[str], batch: list[PictureSource]) -> list[Detection]:
        """Detections of one batch; only the pictures that could be read go to the back-end."""
        backend = self._opened()
        prepared = self._prepare_batch(batch)
        images = [image for image in prepared if not isinstance(image, PictureError)]
        outputs = backend.infer(np.stack(images)) if images else None
        rows = iter(range(len(images)))
        return [
            _failed(name, str(image))
            if isinstance(image, PictureError) or outputs is None
            else self._detection(name, outputs, next(rows))
            for name, image in zip(names, prepared, strict=True)
        ]

    def _prepare_batch(self, batch: list[PictureSource]) -> list[NDArray[np.uint8] | PictureError]:
        # Files and bytes are independent of each other; an image or a stream given twice is not.
        futures = {
            index: self._pool.submit(self._prepare, source)
            for index, source in enumerate(batch)
            if isinstance(source, (str, os.PathLike, bytes))
        }
        return [
            futures[index].result() if index in futures else self._prepare(source) for index, source in enumerate(batch)
        ]

    def _prepare(self, source: PictureSource) -> NDArray[np.uint8] | PictureError:
        try:
            return prepare(decode_picture(source, max_pixels=self._max_pixels), self.manifest.preprocess)
        except PictureError as error:
            return error

    def _detection(self, name: str, outputs: Outputs, row: int) -> Detection:
        logit, similarity = float(outputs.logits[row]), float(outputs.trace_similarity[row])
        evidence = self._calibration.calibrated(outputs.evidence[row]).astype(np.float32)
        if not (np.isfinite(logit) and np.isfinite(similarity) and np.isfinite(evidence).all()):
            error = PictureError(
                name,
                got="a score that is not a finite number",
                wanted="finite outputs",
                remedy=f"choose another precision than {self.info.precision}, and report the picture",
            )
            return _failed(name, str(error))
        return Detection(
            source=name,
            fake_probability=float(self._calibration.fake_probability(logit)),
            verdict=_verdict(str(self._calibration.verdicts(logit))),
            trace_similarity=similarity,
            evidence=evidence,
            error=None,
        )


def _failed(name: str, error: str) -> Detection:
    return Detection(name, None, None, None, None, error)


def _verdict(text: str) -> Verdict:
    verdicts: dict[str, Verdict] = {"real": "real", "uncertain": "uncertain", "fake": "fake"}
    return verdicts[text]


def _source_name(source: object, index: int) -> str:
    """Path of a source that has one, otherwise what it is and its place among the sources."""
    carried = getattr(source, "filename", None) or getattr(source, "name", None)
    named = isinstance(source, (str, os.PathLike)) or isinstance(carried, (str, os.PathLike))
    return describe_source(source) if named else f"#{index} ({describe_source(source)})"


def _require_many(sources: object) -> None:
    """Nothing for a collection of pictures; a str or an array would else be taken apart character by row."""
    if isinstance(sources, np.ndarray) and sources.ndim == 4:
        return
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    if isinstance(sources, single) or hasattr(sources, "read") or not isinstance(sources, Iterable):
        raise UsageError(
            "sources",
            got=f"one {type(sources).__name__}",
            wanted="a list, or another iterable, of pictures",
            remedy="put a single picture in a list: predict([picture])",
        )


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        _refuse_number(name, value)


def _refuse_number(name: str, value: object) -> NoReturn:
    raise UsageError(
        name, got=repr(value), wanted="a whole number of at least 1", remedy="leave it out for the default"
    )
