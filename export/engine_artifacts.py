"""From the ONNX graphs that a manifest names to engines as artifacts of the same bundle."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from export.bundling import engine_file
from export.engine import BuiltEngine, TensorRT, engine_from_onnx
from export.errors import ExportError
from runtime.manifest import ArtifactSpec, ModelManifest, Precision, ProfileSpec

if TYPE_CHECKING:
    from rich.progress import Progress


def engine_source(manifest: ModelManifest, precision: Precision) -> ArtifactSpec:
    """The ONNX graph that an engine of a precision is built from.

    Raises:
        ExportError: the bundle has none.
    """
    source = manifest.onnx_artifact(precision)
    if source is None:
        raise ExportError(
            f"{precision} engine",
            got=f"a bundle with ONNX graphs of {', '.join(manifest.onnx_precisions()) or 'no precision'}",
            wanted=f"one of {precision}",
            remedy=f"export it first: python -m export.trt --run RUN --{precision}",
        )
    return source


def built_artifact(
    source: ArtifactSpec, model: bytes, profile: ProfileSpec, tensorrt: TensorRT, progress: Progress | None = None
) -> tuple[ArtifactSpec, BuiltEngine]:
    """An engine, and what the manifest says of it; its parity is empty, because it was not run.

    Args:
        source: the artifact of the ONNX graph.
        model: content of that graph.
        profile: batches of the engine.
        tensorrt: builds it.
        progress: shows the build's phases.

    Raises:
        ExportError: the engine does not build.
    """
    label = f"{source.precision} engine"
    engine = engine_from_onnx(model, profile, tensorrt=tensorrt, label=label, progress=progress)
    artifact = ArtifactSpec(
        file=engine_file(source.precision, engine.flavour, engine.target),
        format="engine",
        precision=source.precision,
        sha256=hashlib.sha256(engine.content).hexdigest(),
        size_bytes=len(engine.content),
        opset=None,
        profile=engine.profile,
        flavour=engine.flavour,
        targets=engine.targets,
        builder=engine.builder,
        versions={"onnx_sha256": source.sha256},
        higher_precision_layers=source.higher_precision_layers,
        parity=(),
    )
    return artifact, engine


def engine_line(artifact: ArtifactSpec, engine: BuiltEngine) -> str:
    """What was built, in a line."""
    targets = ", ".join(engine.targets) or "this GPU"
    return (
        f"{artifact.precision} engine by {engine.builder} in {engine.build_seconds:.1f} s:"
        f" {len(engine.layers)} layers, {artifact.size_bytes / 1e6:.1f} MB, for {targets}"
    )
