"""What every back-end has in common: its interface, the check of a graph against the contract, and probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError, BundleError
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest


class Outputs(NamedTuple):
    """Outputs of the graph for N pictures, float32.

    logits (N,), trace_similarity (N,), embeddings (N, C), evidence (N, h, w), all raw, not calibrated.
    """

    logits: NDArray[np.float32]
    trace_similarity: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    evidence: NDArray[np.float32]


class TensorInfo(NamedTuple):
    """One input or output as a back-end reports it; a None in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Backend(Protocol):
    """A graph opened on one device."""

    name: str
    device: str
    version: str

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs for images (N, H, W, 3) uint8, N from 1, H and W as in the manifest."""

    def close(self) -> None:
        """Releases the graph; nothing may be inferred afterwards."""


@dataclass(frozen=True)
class Probe:
    """Whether a back-end would run here, found out by trying.

    Args:
        name: of the back-end.
        runs: whether it can be used.
        version: of its package; None where that is not installed.
        device: it would run on; None where it does not run.
        reason: why it does or does not run.
        install: what would make it run, mostly a pip command; empty where it runs.
    """

    name: str
    runs: bool
    version: str | None
    device: str | None
    reason: str
    install: str


def installed_version(*distributions: str) -> str | None:
    """Version of the first of some distributions that is installed, or None."""
    from importlib import metadata  # a third of the time that importing this package would take

    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _first_line(error: object) -> str:
    """What a library said, without the trace that some put behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def refuse_to_open(name: str, error: object) -> NoReturn:
    """Raises the error for a graph that a back-end cannot open; the first line of its own message is kept."""
    raise BackendError(
        f"back-end {name}",
        got=f"a graph that it cannot open ({_first_line(error)})",
        wanted="a graph that it runs completely",
        remedy="choose another backend or precision, or install the versions named by `ntf inspect`",
    )


def refuse_to_run(name: str, error: Exception) -> NoReturn:
    """Raises the error for an inference that fails in a back-end; the first line of its own message is kept."""
    raise BackendError(
        f"back-end {name}",
        got=f"an inference that failed ({_first_line(error)})",
        wanted="one that succeeds",
        remedy="score fewer pictures at once, or choose another backend or precision",
    ) from error


def check_graph(
    inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], manifest: ModelManifest, file: str
) -> None:
    """Nothing when the graph is what the manifest promises, an error otherwise.

    Args:
        inputs: of the opened graph.
        outputs: of the opened graph, in any order.
        manifest: of the bundle.
        file: the artifact, for messages.

    Raises:
        BundleError: a name, type, rank or fixed dimension differs.
    """
    size = manifest.preprocess
    wanted = [TensorInfo(INPUT_NAME, "uint8", (None, size.height, size.width, 3))]
    _check_tensors(inputs, wanted, f"{file}: inputs", free_batch=True)
    shapes: dict[str, tuple[int | None, ...]] = {
        "logits": (None,),
        "trace_similarity": (None,),
        "embeddings": (None, manifest.embedding_dim),
        "evidence": (None, *manifest.evidence_shape),
    }
    wanted = [TensorInfo(name, "float32", shapes[name]) for name in OUTPUTS]
    _check_tensors(outputs, wanted, f"{file}: outputs", free_batch=False)


def output_shapes(pictures: int, manifest: ModelManifest) -> dict[str, tuple[int, ...]]:
    """Shape of each output for a batch, by the contract."""
    return {
        "logits": (pictures,),
        "trace_similarity": (pictures,),
        "embeddings": (pictures, manifest.embedding_dim),
        "evidence": (pictures, *manifest.evidence_shape),
    }


def checked_outputs(arrays: dict[str, NDArray[np.float32]], pictures: int, manifest: ModelManifest) -> Outputs:
    """Outputs of one batch after a check of their shapes; a wrong count would shift every verdict.

    Raises:
        BackendError: an output has another shape than the contract says.
    """
    for name, shape in output_shapes(pictures, manifest).items():
        if arrays[name].shape != shape:
            raise BackendError(
                f"output {name}",
                got=f"shape {arrays[name].shape}",
                wanted=f"{shape}",
                remedy="export the model again; the graph does not keep its contract",
            )
    return Outputs(**{name: arrays[name] for name in OUTPUTS})


def _check_tensors(
    found: Sequence[TensorInfo], wanted: Sequence[TensorInfo], subject: str, *, free_batch: bool
) -> None:
    by_name = {tensor.name: tensor for tensor in found}
    if set(by_name) != {tensor.name for tensor in wanted}:
        _refuse_graph(subject, ", ".join(sorted(by_name)) or "none", ", ".join(t.name for t in wanted))
    for want in wanted:
        got = by_name[want.name]
        fits = got.dtype == want.dtype and len(got.shape) == len(want.shape)
        # A back-end may report a dimension of an output as free that the contract fixes, never another value.
        fits = fits and all(w is None or g is None or g == w for g, w in zip(got.shape, want.shape, strict=True))
        if free_batch:
            fits = fits and got.shape[0] is None and got.shape[1:] == want.shape[1:]
        if not fits:
            _refuse_graph(subject, _described(got), _described(want))


def _described(tensor: TensorInfo) -> str:
    sizes = ", ".join("N" if size is None else str(size) for size in tensor.shape)
    return f"{tensor.name} {tensor.dtype} ({sizes})"


def _refuse_graph(subject: str, got: str, wanted: str) -> NoReturn:
    raise BundleError(subject, got=got, wanted=wanted, remedy="export the model again")
