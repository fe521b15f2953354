"""Engines for a bundle that is there already, built from its ONNX graphs where they will run.

Nothing but numpy and TensorRT is imported: no torch, no onnx, and no pictures are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.bundling import require_only_bundle, sorted_artifacts, write_bundle
from export.engine_artifacts import EngineArtifact, build_engines, engine_source
from export.engine_flavours import find_tensorrt
from export.engine_progress import build_display
from export.errors import ExportError
from export.trt_options import Options, asked_precisions, engine_settings
from runtime.bundle import Bundle, open_bundle
from runtime.manifest import Precision, ProfileSpec


def build_bundle_engines(options: Options) -> Bundle:
    """The bundle that --model names, with an engine for each asked precision; its other files stay as they are.

    Raises:
        NTFError: whatever was wrong, in a full sentence; the bundle stands as it was.
        KeyboardInterrupt: Ctrl-C stopped a build; the bundle stands as it was.
    """
    _refuse_export_options(options)
    assert options.model is not None
    profile = ProfileSpec(options.min_batch, options.opt_batch, options.max_batch)
    bundle = _open_folder(options.model)
    precisions = _precisions(options, bundle)
    sources = [engine_source(bundle.manifest, precision) for precision in precisions]
    require_only_bundle(bundle.location, options.timing_cache)
    tensorrt = find_tensorrt()
    with build_display() as display:
        display.say(f"engines of {bundle.location} with {tensorrt.builder}: {', '.join(precisions)}")
        engines = build_engines(
            sources, bundle.read, profile, engine_settings(options), tensorrt=tensorrt, old=bundle, display=display
        )
    if not all(engine.cached for engine in engines):
        bundle = _with_engines(bundle, engines)
    print(f"model bundle: {bundle.location}")
    return bundle


def _with_engines(bundle: Bundle, engines: Sequence[EngineArtifact]) -> Bundle:
    artifacts = {artifact.file: artifact for artifact in bundle.manifest.artifacts}
    artifacts |= {engine.spec.file: engine.spec for engine in engines}
    files = {spec.file: bundle.read(spec) for spec in bundle.manifest.files()}
    files |= {engine.spec.file: engine.content for engine in engines}
    manifest = replace(bundle.manifest, artifacts=sorted_artifacts(artifacts.values()))
    return write_bundle(bundle.location, manifest, files)


def _precisions(options: Options, bundle: Bundle) -> list[Precision]:
    """The asked precisions, or all that the bundle has graphs of where none was asked for."""
    asked = asked_precisions(options)
    if options.fp32 or options.fp16 or options.int8:
        return asked
    # A bundle without any graph keeps all of them, and is refused with the first.
    return [precision for precision in asked if bundle.manifest.onnx_artifact(precision) is not None] or asked


def _refuse_export_options(options: Options) -> None:
    names = (
        *("data", "engine", "calibration_pictures", "calibrator", "int8_share", "qdq_onnx"),
        *("budget_ap", "budget_accuracy", "budget_flips", "budget_ece"),
    )
    given = [name for name in names if getattr(options, name) != getattr(Options(), name)]
    if given:
        raise ExportError(
            f"--model {options.model}",
            got=f"{given[0]} of an export, for a bundle that is there already",
            wanted="options of engines only",
            remedy="add --run RUN to export it again, or leave that option out",
        )


def _open_folder(path: Path) -> Bundle:
    bundle = open_bundle(path)
    if bundle.inside is not None:
        raise ExportError(
            f"--model {path}",
            got="a .zip, which is not written into",
            wanted="a bundle folder",
            remedy="unpack it, and build the engines in the folder",
        )
    return bundle
