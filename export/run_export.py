"""A trained run becomes a model bundle: graphs, their parity with PyTorch, calibration, golden inputs and engines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
from onnx import ModelProto
from rich.console import Console
from rich.progress import track

from export.budget import Budget
from export.bundling import (
    CALIBRATION_FILE,
    GOLDEN_FILE,
    calibration_list_spec,
    existing_bundle,
    golden_content,
    golden_images,
    golden_spec,
    kept_artifacts,
    onnx_file,
    require_only_bundle,
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
from export.foreign import foreign_int8
from export.graphs import PrecisionGraph, checked_graph, reduced_graphs
from export.int8 import BudgetError
from export.int8_kept import KEPT_FILE, KeptInt8, saying_what_is_kept, search_key
from export.int8_report import write_search
from export.judge import BATCH_SIZE, CALIBRATED_ON, Candidate, Judge
from export.onnx_export import onnx_from_model, torch_outputs
from export.parity import LIMITS, opened_backends, running_backends
from export.report import parity_table
from export.run_inputs import RunInputs, load_run
from export.trt_options import Options, asked_precisions, engine_settings
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.manifest import (
    LABELS,
    OUTPUTS,
    PRECISIONS,
    SCHEMA_VERSION,
    ArtifactSpec,
    CalibrationListSpec,
    ModelManifest,
    ParitySpec,
    Precision,
    ProfileSpec,
    Remainder,
)
from train.checkpoint import newest_run
from train.provenance import tool_commit, tool_version

MODELS = Path("models")

Parity = Mapping[tuple[Precision, Remainder], tuple[ParitySpec, ...]]


def export_run(options: Options) -> Bundle:
    """The bundle of a run, written and read back.

    Raises:
        NTFError: whatever was wrong, in a full sentence; an earlier bundle stands as it was.
    """
    profile, budget = ProfileSpec(options.min_batch, options.opt_batch, options.max_batch), Budget.of(options)
    precisions, limit = asked_precisions(options), calibration_limit(options)
    run = options.run or newest_run()
    folder = options.model or MODELS / run.resolve().name
    console = Console(markup=False, soft_wrap=True)  # "[rtx]" and file names are not markup
    console.print(f"exporting {run} to {folder}: {', '.join(precisions)}")
    tensorrt = installed_tensorrt(engine_settings(options), console) if options.engine else None
    inputs = load_run(run, data=options.data)
    old = existing_bundle(folder, inputs.checkpoint_sha256)
    require_only_bundle(folder, options.timing_cache)

    console.print("exporting the PyTorch model to ONNX")
    fp32 = onnx_from_model(inputs.detector)
    graphs = [checked_graph("fp32", fp32, {})]
    draft = draft_manifest(folder.name, inputs, graphs[0].evidence_shape)
    judge = judge_of(inputs, draft, budget)
    pictures = calibration_pictures(inputs.validation, inputs.spec, limit=limit)
    graphs += narrow_graphs(options, fp32, precisions, pictures, judge, run, console)

    kept = kept_artifacts(old, precisions, {"fp32": graphs[0].content})
    earlier = [Candidate(a.precision, content, a.remainder) for a, content in kept if a.format == "onnx"]
    calibration, parity = judge.parity([*graphs, *sorted(earlier, key=lambda c: c.remainder == "fp16")])
    refuse_outside_limits(parity)
    files = {artifact.file: content for artifact, content in kept}
    files |= {onnx_file(graph.precision, graph.remainder): graph.content for graph in graphs}
    files[GOLDEN_FILE] = golden_of([*graphs, *earlier], draft, judge.backends)
    artifacts = [replace(a, parity=parity[a.precision, a.remainder] if a.format == "onnx" else ()) for a, _ in kept]
    artifacts += [onnx_artifact(graph, parity[graph.precision, graph.remainder]) for graph in graphs]
    manifest = replace(
        draft, calibration=calibration, artifacts=tuple(artifacts), golden=golden_spec(files[GOLDEN_FILE])
    )
    if (listed := calibration_list(options, precisions, pictures, old)) is not None:
        files[CALIBRATION_FILE], spec = listed
        manifest = replace(manifest, calibration_list=spec)
    if tensorrt is not None:
        sources = [engine_source(manifest, precision) for precision in precisions]
        kept_file = run / KEPT_FILE if "int8" in precisions and options.qdq_onnx is None else None
        with build_display(console) as display, saying_what_is_kept(kept_file):
            engines = build_engines(
                sources, lambda source: files[source.file], profile, engine_settings(options),
                tensorrt=tensorrt, old=old, display=display,
            )  # fmt: skip
        artifacts += [engine.spec for engine in engines]
        files |= {engine.spec.file: engine.content for engine in engines}
    bundle = write_bundle(folder, replace(manifest, artifacts=sorted_artifacts(artifacts)), files)
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


def calibration_limit(options: Options) -> int:
    """How many pictures INT8 and FP16 ranges are measured on at most.

    Raises:
        ExportError: none, or a graph of another quantiser without --int8.
    """
    limit = PICTURE_LIMIT if options.calibration_pictures is None else options.calibration_pictures
    if limit < 1:
        raise ExportError(
            "--calibration-pictures", got=str(limit), wanted="at least 1", remedy=f"leave it out for {PICTURE_LIMIT}"
        )
    if options.qdq_onnx is not None and "int8" not in asked_precisions(options):
        raise ExportError(
            f"--qdq-onnx {options.qdq_onnx}",
            got=f"an export of {', '.join(asked_precisions(options))}",
            wanted="an export of INT8",
            remedy="add --int8",
        )
    return limit


def judge_of(inputs: RunInputs, draft: ModelManifest, budget: Budget) -> Judge:
    """Compares graphs with the PyTorch model of a run on its validation pictures.

    Raises:
        ExportError: no back-end runs here, or a picture is bad.
    """
    pictures = PreparedPictures(inputs.validation, inputs.spec, inputs.validation_sha256)
    total = -(-len(pictures) // BATCH_SIZE)
    batches = track(pictures.batches(BATCH_SIZE), f"scoring {len(pictures)} pictures in PyTorch", total=total)
    reference = np.concatenate([torch_outputs(inputs.detector, images)[0] for images in batches])
    return Judge(pictures, reference, inputs.calibration, draft, running_backends(), budget, progress=True)


def narrow_graphs(
    options: Options,
    fp32: ModelProto,
    precisions: Sequence[Precision],
    pictures: PreparedPictures,
    judge: Judge,
    run: Path,
    console: Console,
) -> list[PrecisionGraph]:
    """The asked graphs below FP32; how INT8 was found is written into the run's report, also where it was not.

    Raises:
        ExportError: a graph breaks the contract, or INT8 does not keep within the budget.
    """
    if options.qdq_onnx is not None:
        precisions = [*(name for name in precisions if name != "int8")]
    kept = kept_int8(options, fp32, pictures, judge, run) if "int8" in precisions else None
    try:
        graphs, search = reduced_graphs(
            fp32,
            precisions,
            pictures,
            judge,
            calibrator=options.calibrator,
            smallest_share=options.int8_share,
            kept=kept,
            say=console.print,
        )
    except BudgetError as error:
        write_search(run, error.search, judge.budget, console)
        raise
    if search is not None:
        write_search(run, search, judge.budget, console)
    if options.qdq_onnx is not None:
        graphs.append(foreign_int8(options.qdq_onnx, fp32))
        refuse_over_budget(graphs[-1], judge)
    return graphs


def kept_int8(options: Options, fp32: ModelProto, pictures: PreparedPictures, judge: Judge, run: Path) -> KeptInt8:
    """Where the run keeps the INT8 graph that these options find."""
    key = search_key(fp32, pictures, judge, calibrator=options.calibrator, smallest_share=options.int8_share)
    return KeptInt8(run / KEPT_FILE, key)


def refuse_over_budget(graph: PrecisionGraph, judge: Judge) -> None:
    """Refuse a graph that someone else quantised and that costs too much.

    Raises:
        ExportError: it is over the budget.
    """
    over = [f"{what} on {cost.backend}" for cost in judge.costs([graph]) for what in cost.excess(judge.budget)]
    if over:
        raise ExportError(
            f"INT8 graph by {graph.builder}",
            got="; ".join(over),
            wanted="a graph within the accuracy budget",
            remedy="quantise fewer layers, or allow more (--budget-flips, --budget-ap, ...)",
        )


def refuse_outside_limits(parity: Parity) -> None:
    """Refuse to ship a graph that differs too much from PyTorch.

    Raises:
        ExportError: naming the first graph and back-end.
    """
    for (precision, remainder), figures in parity.items():
        for found in figures:
            if not found.passed:
                raise ExportError(
                    f"{onnx_file(precision, remainder)} on {found.backend}",
                    got=f"logits that differ by up to {found.logit_diff_max:.3g} and {found.verdict_flips} other"
                    f" verdicts of {found.pictures}",
                    wanted=f"parity with PyTorch ({LIMITS[precision].reason})",
                    remedy="export the other precisions only, and see python -m export.verify --layers",
                )


def golden_of(candidates: Sequence[Candidate], draft: ModelManifest, backends: Sequence[str]) -> bytes:
    """Golden inputs with the outputs of each precision on the back-end that it is calibrated on."""
    contents = {c.precision: c.content for c in candidates if c.remainder == "fp32"}
    name = CALIBRATED_ON if CALIBRATED_ON in backends else backends[0]
    with opened_backends(contents, draft, [name]) as opened:
        images = golden_images(draft.preprocess.height, draft.preprocess.width)
        return golden_content(images, {precision: backend for (precision, _), backend in opened.items()})


def calibration_list(
    options: Options, precisions: Sequence[Precision], pictures: PreparedPictures, old: Bundle | None
) -> tuple[bytes, CalibrationListSpec] | None:
    """The pictures that INT8 was measured on, now or for an INT8 graph that stays, as a file, or None."""
    if "int8" in precisions:
        if options.qdq_onnx is not None:
            return None
        content = pictures.listing()
        return content, calibration_list_spec(content, len(pictures))
    if old is None or old.manifest.calibration_list is None:
        return None
    return old.read(old.manifest.calibration_list), old.manifest.calibration_list


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
        file=onnx_file(graph.precision, graph.remainder),
        format="onnx",
        precision=graph.precision,
        sha256=hashlib.sha256(graph.content).hexdigest(),
        size_bytes=len(graph.content),
        opset=graph.opset,
        profile=None,
        flavour=None,
        targets=(),
        builder=graph.builder or f"torch.onnx {metadata.version('torch').partition('+')[0]}",
        versions={name: metadata.version(name) for name in ("onnx", "onnxscript", "timm")},
        higher_precision_layers=graph.higher_precision_layers,
        parity=parity,
        remainder=graph.remainder,
    )


def report(console: Console, bundle: Bundle) -> None:
    """Print what was written."""
    artifacts = sorted(bundle.manifest.artifacts, key=lambda a: PRECISIONS.index(a.precision))
    console.print(parity_table([(_graph_name(a), parity) for a in artifacts for parity in a.parity]))
    for artifact in bundle.manifest.artifacts:
        console.print(f"  {artifact.file}  {artifact.size_bytes / 1e6:.1f} MB")
    console.print(f"model bundle: {bundle.location}")


def _graph_name(artifact: ArtifactSpec) -> str:
    return artifact.precision if artifact.remainder == "fp32" else f"{artifact.precision}+{artifact.remainder}"
