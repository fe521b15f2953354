"""From the ONNX graphs that a manifest names to engines as artifacts of the same bundle, built once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from export.bundling import engine_file
from export.engine import BuiltEngine, EngineSettings, check_settings, engine_from_onnx
from export.engine_flavours import TensorRT
from export.engine_plan import count_layers
from export.engine_progress import Display
from export.engine_targets import Target, resolve_target
from export.errors import ExportError
from runtime.bundle import Bundle
from runtime.manifest import ArtifactSpec, EngineSpec, ModelManifest, Precision, ProfileSpec
from runtime.strict_json import canonical_json


@dataclass(frozen=True)
class EngineArtifact:
    """An engine as a bundle holds it, and whether it was there already."""

    spec: ArtifactSpec
    content: bytes
    cached: bool


def engine_source(manifest: ModelManifest, precision: Precision) -> ArtifactSpec:
    """The ONNX graph that an engine of a precision is built from: where there is one, that with an FP16 remainder.

    Raises:
        ExportError: the bundle has none.
    """
    source = manifest.onnx_artifact(precision, "fp16") or manifest.onnx_artifact(precision)
    if source is None:
        raise ExportError(
            f"{precision} engine",
            got=f"a bundle with ONNX graphs of {', '.join(manifest.onnx_precisions()) or 'no precision'}",
            wanted=f"one of {precision}",
            remedy=f"export it first: python -m export.trt --run RUN --{precision}",
        )
    return source


def build_engines(
    sources: Iterable[ArtifactSpec],
    read: Callable[[ArtifactSpec], bytes],
    profile: ProfileSpec,
    settings: EngineSettings,
    *,
    tensorrt: TensorRT,
    old: Bundle | None,
    display: Display,
) -> list[EngineArtifact]:
    """An engine for each source; one that an earlier build left with the same key is taken as it is.

    Args:
        sources: artifacts of ONNX graphs.
        read: gives the content of one.
        profile: batches of the engines.
        settings: how they are built.
        tensorrt: builds them.
        old: a sound bundle whose engines may be taken; None where there is none.
        display: shows what happens.

    Raises:
        ExportError: an engine does not build, or this TensorRT lacks a setting.
        KeyboardInterrupt: Ctrl-C stopped a build.
    """
    check_settings(tensorrt, settings)
    target = resolve_target(tensorrt, settings.target, hardware_compatible=settings.hardware_compatible)
    if target.note:
        display.say(f"note: {target.note}")
    engines = []
    for source in sources:
        key = cache_key(source.sha256, profile, target, settings, tensorrt)
        found = _cached(old, key)
        if found is not None:
            display.say(f"{source.precision} engine is already built: {found.spec.file}")
        else:
            label = f"{source.precision} engine"
            engine = engine_from_onnx(
                read(source), profile, tensorrt=tensorrt, label=label, settings=settings, display=display
            )
            found = EngineArtifact(_engine_artifact(source, engine, settings, key), engine.content, cached=False)
            display.say(_engine_line(found.spec, engine))
        engines.append(found)
    return engines


def cache_key(
    source_sha256: str, profile: ProfileSpec, target: Target, settings: EngineSettings, tensorrt: TensorRT
) -> str:
    """SHA-256 of everything that an engine depends on; engines of one key may differ in bytes, not in what they do.

    Args:
        source_sha256: of the ONNX graph.
        profile: batches.
        target: what it is built for.
        settings: of the build; a timing cache changes the time that it takes, so it is left out.
        tensorrt: the builder.
    """
    facts = {
        "source_sha256": source_sha256,
        "batches": [profile.min_batch, profile.opt_batch, profile.max_batch],
        "targets": list(target.capabilities),
        "gpu": target.gpu,
        "workspace_mib": settings.workspace_mib,
        "version_compatible": settings.version_compatible,
        "hardware_compatible": settings.hardware_compatible,
        "tf32": settings.tf32,
        "builder": tensorrt.builder,
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _cached(old: Bundle | None, key: str) -> EngineArtifact | None:
    if old is None:
        return None
    for artifact in old.manifest.artifacts:
        if artifact.engine is not None and artifact.engine.cache_key == key:
            return EngineArtifact(artifact, old.read(artifact), cached=True)
    return None


def _engine_artifact(source: ArtifactSpec, engine: BuiltEngine, settings: EngineSettings, key: str) -> ArtifactSpec:
    """What the manifest says of an engine; its parity is empty, because it was not run."""
    return ArtifactSpec(
        file=engine_file(source.precision, engine.flavour, engine.target.name),
        format="engine",
        precision=source.precision,
        sha256=hashlib.sha256(engine.content).hexdigest(),
        size_bytes=len(engine.content),
        opset=None,
        profile=engine.profile,
        flavour=engine.flavour,
        targets=engine.target.capabilities,
        builder=engine.builder,
        versions={},
        higher_precision_layers=source.higher_precision_layers,
        parity=(),
        engine=EngineSpec(
            source=source.file,
            source_sha256=source.sha256,
            cache_key=key,
            gpu=engine.target.gpu,
            workspace_mib=settings.workspace_mib,
            version_compatible=settings.version_compatible,
            hardware_compatible=settings.hardware_compatible,
            layers=count_layers(engine.layers),
            tf32=settings.tf32,
        ),
    )


def _engine_line(artifact: ArtifactSpec, engine: BuiltEngine) -> str:
    return (
        f"{artifact.precision} engine by {engine.builder} in {engine.build_seconds:.1f} s:"
        f" {len(engine.layers)} layers, {artifact.size_bytes / 1e6:.1f} MB, for {', '.join(artifact.targets)}"
    )
