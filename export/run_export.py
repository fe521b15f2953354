"""A trained run becomes a model bundle: graphs, their parity with PyTorch, calibration, golden inputs and engines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from export.bundling import (
    GOLDEN_FILE,
    existing_bundle,
    golden_content,
    golden_images,
    golden_spec,
    kept_artifacts,
    onnx_file,
    sorted_artifacts,
    write_bundle,
)
from export.calibration import PICTURE_LIMIT, PreparedPictures, calibration_pictures
from export.engine import EngineSettings, check_settings
from export.engine_artifacts import build_engines, engine_source
from export.engine_flavours import TensorRT, find_tensorrt
from export.engine_progress import build_display
from export.engine_targets import resolve_target
from export.errors import ExportError
from export.graphs import PrecisionGraph, make_graphs
from export.parity import (
    LIMITS,
    Labels,
    Logits,
    centred_thresholds,
    collect_logits,
    compare_logits,
    opened_backends,
    running_backends,
)
from export.report import parity_table
from export.run_inputs import RunInputs, load_run
from export.trt_options import Options, asked_precisions, engine_settings
from runtime.backends import Backend
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.manifest import (
    LABELS,
    OUTPUTS,
    PRECISIONS,
    SCHEMA_VERSION,
    ArtifactSpec,
    CalibrationSpec,
    ModelManifest,
    ParitySpec,
    Precision,
    ProfileSpec,
)
from train.checkpoint import newest_run
from train.metrics import fit_calibration
from train.provenance import tool_commit, tool_version

MODELS = Path("models")
BATCH_SIZE = 16


def export_run(options: Options) -> Bundle:
    """The bundle of a run, written and read back.

    Raises:
        NTFError: whatever was wrong, in a full sentence; an earlier bundle stands as it was.
    """
    profile = ProfileSpec(options.min_batch, options.opt_batch, options.max_batch)
    precisions = asked_precisions(options)
    run = options.run or newest_run()
    folder = options.model or MODELS / run.resolve().name
    console = Console(markup=False, soft_wrap=True)  # "[rtx]" and file names are not markup
    console.print(f"exporting {run} to {folder}: {', '.join(precisions)}")
    tensorrt = installed_tensorrt(engine_settings(options), console) if options.engine else None
    inputs = load_run(run, data=options.data)
    old = existing_bundle(folder, inputs.checkpoint_sha256)

    limit = PICTURE_LIMIT if options.calibration_pictures is None else options.calibration_pictures
    pictures = calibration_pictures(inputs.validation, inputs.spec, limit=limit)
    graphs = make_graphs(
        inputs.detector, precisions, pictures, int8_remainder=options.int8_remainder, say=console.print, progress=True
    )
    contents: dict[Precision, bytes] = {name: graph.content for name, graph in graphs.items()}
    kept = kept_artifacts(old, precisions, contents)
    contents |= {artifact.precision: content for artifact, content in kept if artifact.format == "onnx"}

    draft = draft_manifest(folder.name, inputs, graphs["fp32"].evidence_shape)
    with opened_backends(contents, draft, running_backends()) as backends:
        calibration, parity = measure(inputs, backends)
        golden = golden_content(golden_images(inputs.spec.height, inputs.spec.width), reference_backends(backends))

    files = {artifact.file: content for artifact, content in kept}
    artifacts = [replace(a, parity=parity.get(a.precision, ()) if a.format == "onnx" else ()) for a, _ in kept]
    for graph in graphs.values():
        artifacts.append(onnx_artifact(graph, parity.get(graph.precision, ())))
        files[artifacts[-1].file] = graph.content
    files[GOLDEN_FILE] = golden
    manifest = replace(draft, calibration=calibration, artifacts=tuple(artifacts), golden=golden_spec(golden))
    if tensorrt is not None:
        sources = [engine_source(manifest, precision) for precision in precisions]
        with build_display(console) as display:
            engines = build_engines(
                sources, lambda source: files[source.file], profile, engine_settings(options),
                tensorrt=tensorrt, old=old, display=display,
            )  # fmt: skip
        artifacts += [engine.spec for engine in engines]
        files |= {engine.spec.file: engine.content for engine in engines}
    manifest = replace(manifest, artifacts=sorted_artifacts(artifacts))
    bundle = write_bundle(folder, manifest, files)
    report(console, bundle)
    return bundle


def installed_tensorrt(settings: EngineSettings, console: Console) -> TensorRT | None:
    """The TensorRT that will build engines, asked before the long work begins; None where it is missing, which is said.

    Raises:
        ExportError: it lacks a setting, or the target.
    """
    try:
        tensorrt = find_tensorrt()
    except BackendError as error:
        console.print(
            f"no engines: TensorRT is not installed; the ONNX graphs are complete without it.\n  {error.remedy}"
        )
        return None
    check_settings(tensorrt, settings)
    resolve_target(tensorrt, settings.target, hardware_compatible=settings.hardware_compatible)
    return tensorrt


def measure(
    inputs: RunInputs, backends: Mapping[tuple[str, str], Backend]
) -> tuple[dict[str, CalibrationSpec], dict[str, tuple[ParitySpec, ...]]]:
    """Calibration of each precision from its own logits, and its parity with PyTorch on every back-end.

    Raises:
        ExportError: no back-end runs here.
    """
    if not backends:
        raise ExportError(
            "export",
            got="no back-end that runs here",
            wanted="onnxruntime or openvino, to check what was exported",
            remedy='pip install "ntf-toolkit[export]"',
        )
    pictures = PreparedPictures(inputs.validation, inputs.spec, inputs.validation_sha256)
    batches = track(
        pictures.batches(BATCH_SIZE),
        f"comparing with PyTorch on {len(pictures)} pictures",
        total=-(-len(pictures) // BATCH_SIZE),
    )
    reference, scored = collect_logits(inputs.detector, backends, batches)
    labels = np.array([record.label for record in inputs.validation.records])
    calibration: dict[str, CalibrationSpec] = {}
    parity: dict[str, tuple[ParitySpec, ...]] = {}
    for (precision, backend), logits in scored.items():
        if precision not in calibration:
            fitted_on = reference_logits(scored, precision)
            calibration[precision] = fit_precision(fitted_on, labels, inputs.calibration)
        figures = compare_logits(
            logits,
            reference,
            labels,
            calibration=calibration[precision],
            reference_calibration=centred_thresholds(inputs.calibration, reference),
            backend=backend,
            limits=LIMITS[precision],
        )
        parity[precision] = (*parity.get(precision, ()), figures)
    return calibration, parity


def fit_precision(logits: Logits, labels: Labels, run: CalibrationSpec) -> CalibrationSpec:
    """Calibration of one precision for the rates and the rule that the run chose."""
    fitted = fit_calibration(
        logits,
        labels,
        real_flagged_rate=run.real_flagged_rate,
        fake_missed_rate=run.fake_missed_rate,
        rule=run.threshold_rule,
    )
    return centred_thresholds(fitted, logits)


def reference_logits(scored: Mapping[tuple[str, str], Logits], precision: str) -> Logits:
    """Logits that a precision is calibrated on: onnxruntime's where it runs, which is everywhere else too."""
    mine = {backend: logits for (name, backend), logits in scored.items() if name == precision}
    return mine.get("onnxruntime", next(iter(mine.values())))


def reference_backends(backends: Mapping[tuple[str, str], Backend]) -> dict[str, Backend]:
    """The back-end of each precision that golden outputs come from."""
    chosen: dict[str, Backend] = {}
    for (precision, name), backend in backends.items():
        if precision not in chosen or name == "onnxruntime":
            chosen[precision] = backend
    return chosen


def draft_manifest(name: str, inputs: RunInputs, evidence_shape: tuple[int, int]) -> ModelManifest:
    """Manifest without artifacts, enough for back-ends to check a graph against."""
    detector = inputs.detector
    return ModelManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        encoder=detector.encoder_name,
        preprocess=inputs.spec,
        labels=LABELS,
        outputs=OUTPUTS,
        embedding_dim=detector.embedding_dim,
        evidence_shape=evidence_shape,
        calibration=dict.fromkeys(PRECISIONS, inputs.calibration),
        mean_trace=tuple(float(value) for value in detector.mean_trace),
        artifacts=(),
        golden=None,
        checkpoint_sha256=inputs.checkpoint_sha256,
        training_data_sha256=inputs.training_data_sha256,
        calibration_data_sha256=inputs.validation_sha256,
        calibration_pictures=len(inputs.validation),
        tool_version=tool_version(),
        tool_commit=tool_commit(),
    )


def onnx_artifact(graph: PrecisionGraph, parity: tuple[ParitySpec, ...]) -> ArtifactSpec:
    """What the manifest says of an ONNX graph."""
    return ArtifactSpec(
        file=onnx_file(graph.precision),
        format="onnx",
        precision=graph.precision,
        sha256=hashlib.sha256(graph.content).hexdigest(),
        size_bytes=len(graph.content),
        opset=graph.opset,
        profile=None,
        flavour=None,
        targets=(),
        builder=f"torch.onnx {metadata.version('torch').partition('+')[0]}",
        versions={name: metadata.version(name) for name in ("onnx", "onnxscript", "timm")},
        higher_precision_layers=graph.higher_precision_layers,
        parity=parity,
    )


def report(console: Console, bundle: Bundle) -> None:
    """Print what was written, and a warning for each precision outside its limits."""
    by_precision = sorted(bundle.manifest.artifacts, key=lambda a: PRECISIONS.index(a.precision))
    console.print(parity_table([(a.precision, parity) for a in by_precision for parity in a.parity]))
    for artifact in bundle.manifest.artifacts:
        console.print(f"  {artifact.file}  {artifact.size_bytes / 1e6:.1f} MB")
        for parity in artifact.parity:
            if not parity.passed:
                console.print(
                    f"warning: {artifact.file} on {parity.backend} is outside its limits; backend='auto' will not "
                    f"choose it. See python -m export.verify --model {bundle.location}",
                    style="bold yellow",
                )
    console.print(f"model bundle: {bundle.location}")
