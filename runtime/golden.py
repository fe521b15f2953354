"""Golden inputs: pictures stored in a bundle with the outputs they must give, asked again of what is opened here.

A hash says that a graph is the one that was exported; only running it says that this machine computes it rightly.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, output_shapes
from runtime.bundle import Bundle
from runtime.errors import BackendError, BundleError
from runtime.manifest import OUTPUTS, GoldenSpec

# The back-end that an export takes its golden outputs from.
STORED_FROM = "onnxruntime"
# Some pictures and their outputs; 64 of 224 px are 10 MB.
_MAX_INFLATED_BYTES = 1 << 28


@dataclass(frozen=True)
class GoldenTolerance:
    """How far outputs may be from the stored ones: norm of the difference over norm of the stored values.

    Args:
        scores: for `logits`, `trace_similarity` and `evidence`.
        embeddings: for `embeddings`, which come before the classifier enlarges an error.
        reason: why these figures.
    """

    scores: float
    embeddings: float
    reason: str

    def of(self, output: str) -> float:
        """Tolerance of an output."""
        return self.embeddings if output == "embeddings" else self.scores


# In brackets what a trained EfficientNet-lite0 showed, scores and embeddings: with other kernels of onnxruntime or in
# OpenVINO, and for INT8 elsewhere in OpenVINO.
_FP32 = GoldenTolerance(1e-4, 1e-5, "float32 adds up in another order")  # (2e-6, 3e-7)
_FP16 = GoldenTolerance(3e-2, 3e-3, "half precision may round elsewhere, at most what it costs")  # (1e-4, 8e-6)
_INT8 = GoldenTolerance(1e-1, 1e-2, "the last bit of a float between integer layers moves single steps")  # (3e-2, 5e-4)
_INT8_ELSEWHERE = GoldenTolerance(
    1.0,
    5e-2,
    "other back-ends fuse and round between integer layers in their own way",  # (2e-1, 3e-3)
)


@dataclass(frozen=True)
class GoldenCheck:
    """Stored outputs against those of a back-end.

    Args:
        precision: of the graph.
        backend: that ran it.
        differences: norm of the difference over norm of the stored values, by output.
        limits: what each may be at most.
        reason: why these limits.
    """

    precision: str
    backend: str
    differences: dict[str, float]
    limits: dict[str, float]
    reason: str

    @property
    def worst(self) -> str:
        """The output that is nearest to its limit, or furthest beyond it."""
        return max(self.differences, key=lambda output: self.differences[output] / self.limits[output])

    def broken(self) -> list[str]:
        """Each output that is wrong, in words; empty when all are right."""
        # Written so that NaN is wrong.
        return [
            f"{output} off by {100 * value:.3g} %, at most {100 * self.limits[output]:g} %"
            for output, value in self.differences.items()
            if not value <= self.limits[output]
        ]


def golden_tolerance(precision: str, backend: str) -> GoldenTolerance:
    """Tolerance of a precision on a back-end."""
    if precision == "int8":
        return _INT8 if backend == STORED_FROM else _INT8_ELSEWHERE
    return {"fp32": _FP32, "fp16": _FP16}[precision]


def check_golden(bundle: Bundle, backend: Backend, precision: str) -> GoldenCheck:
    """The golden inputs of a bundle, run and compared.

    Args:
        bundle: with golden inputs.
        backend: a graph of the bundle, opened.
        precision: of that graph.

    Raises:
        BundleError: the bundle has no golden inputs, none for this precision, or they do not fit the model.
    """
    images, stored = _golden_arrays(bundle, precision)
    found = backend.infer(images)._asdict()
    tolerance = golden_tolerance(precision, backend.name)
    return GoldenCheck(
        precision,
        backend.name,
        {output: _relative_difference(found[output], values) for output, values in stored.items()},
        {output: tolerance.of(output) for output in stored},
        tolerance.reason,
    )


def require_golden(bundle: Bundle, backend: Backend, precision: str) -> GoldenCheck:
    """`check_golden`, refused where an output is wrong.

    Raises:
        BundleError: as for `check_golden`.
        BackendError: an output is outside its tolerance.
    """
    check = check_golden(bundle, backend, precision)
    if broken := check.broken():
        raise BackendError(
            f"golden inputs of {bundle.location} at {precision} on {backend.name} {backend.version}, {backend.device}",
            got="; ".join(broken),
            wanted="the outputs that the export stored",
            remedy="do not trust its scores on this machine: choose another backend or precision, or install the "
            "versions that `ntf inspect` names",
        )
    return check


def _relative_difference(found: NDArray[np.float32], stored: NDArray[np.float64]) -> float:
    norm = max(float(np.linalg.norm(stored)), float(np.finfo(np.float32).tiny))
    return float(np.linalg.norm(found - stored)) / norm


def _golden_arrays(bundle: Bundle, precision: str) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float64]]]:
    """Golden pictures, and the stored outputs of a precision by name."""
    spec = bundle.manifest.golden
    if spec is None:
        raise BundleError(
            str(bundle.location),
            got="a bundle without golden inputs",
            wanted="golden inputs to check against",
            remedy="export the model again, or load it without this check",
        )
    arrays = _loaded(bundle, spec)
    size = bundle.manifest.preprocess
    shapes = output_shapes(spec.pictures, bundle.manifest) | {"images": (spec.pictures, size.height, size.width, 3)}
    stored = {output: arrays[f"{precision}.{output}"] for output in OUTPUTS if f"{precision}.{output}" in arrays}
    if "logits" not in stored:
        _refuse(bundle, spec, f"no {precision}.logits", f"outputs of the {precision} graph")
    for output, values in {"images": arrays.get("images", np.empty(0)), **stored}.items():
        if values.shape != shapes[output] or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            got = f"{output} of shape {values.shape} and type {values.dtype}"
            _refuse(bundle, spec, got, f"finite values of shape {shapes[output]}")
    if arrays["images"].dtype != np.uint8:
        _refuse(bundle, spec, f"images of type {arrays['images'].dtype}", "uint8")
    return arrays["images"].astype(np.uint8), {name: values.astype(np.float64) for name, values in stored.items()}


def _loaded(bundle: Bundle, spec: GoldenSpec) -> Mapping[str, NDArray[np.generic]]:
    data = io.BytesIO(bundle.read(spec))
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
            inflated = sum(info.file_size for info in entries)
            # Of other methods, zipfile inflates a whole block at once, however little is asked for.
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in entries):
                raise ValueError("an entry that is neither stored nor deflated")
            if inflated > _MAX_INFLATED_BYTES:
                raise ValueError(f"{inflated} bytes of arrays, more than {_MAX_INFLATED_BYTES}")
            return {info.filename.removesuffix(".npy"): _array(_inflated(archive, info)) for info in entries}
    except Exception as error:  # zipfile, zlib, NumPy and its reader of headers raise almost anything
        _refuse(bundle, spec, f"a file that cannot be read ({error})", "NumPy arrays in a .npz file")


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        # Asked for everything, zipfile inflates first and looks at what the entry claims afterwards.
        return file.read(info.file_size + 1)


def _array(data: bytes) -> NDArray[np.generic]:
    """Array of a .npy file. NumPy's own reader reserves what the header claims before it looks at what is there."""
    stream = io.BytesIO(data)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, by_columns, dtype = read_header(stream)
    there = len(data) - stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"{there} bytes for an array of shape {shape} and type {dtype}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")


def _refuse(bundle: Bundle, spec: GoldenSpec, got: str, wanted: str) -> NoReturn:
    raise BundleError(
        str(bundle.location / spec.file), got=got, wanted=wanted, remedy="export the model again with this version"
    )
