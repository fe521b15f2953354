"""All checks of a model bundle, on every precision and back-end that runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from onnx import ModelProto
from rich.progress import track

from export.batch_invariance import BATCH, BatchInvariance, check_batch_invariance, extreme_pictures
from export.budget import Budget
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.judge import NODE_BY_NODE, Candidate, Judge
from export.latency import BATCHES, LatencySweep, joined_sweeps, measure_latency
from export.layer_comparison import LayerComparison, compare_layers
from export.parity import (
    LIMITS,
    broken_limits,
    centred_thresholds,
    collect_logits,
    compare_logits,
    opened_backends,
    running_backends,
    unit_of_evidence,
)
from export.report import graph_name, graph_parts
from export.run_inputs import require_checkpoint
from export.trt_options import Options
from export.verification import Scores, Verification
from runtime.backends import Backend
from runtime.bundle import Bundle
from runtime.detector import Detector
from runtime.golden import check_golden
from runtime.manifest import PRECISIONS, ParitySpec, Precision
from train.checkpoint import load_calibration, load_detector
from train.pictures import PictureSet

BATCH_SIZE = 16
# Whole feature maps are compared: few pictures make a statistic.
LAYER_PICTURES = 16

Backends: TypeAlias = Mapping[tuple[str, str], Backend]


def verify_bundle(
    bundle: Bundle,
    run: Path,
    pictures: PictureSet,
    *,
    layers: Mapping[Precision, float] | None = None,
    latency_seconds: float | None = None,
) -> Verification:
    """Every ONNX graph of a bundle on every back-end that runs here, through all checks.

    The INT8 graph with an FP16 remainder, which is for engines, is compared with PyTorch alone, on one back-end.

    Args:
        bundle: opened, so its files are what the manifest says.
        run: the run folder it was exported from.
        pictures: labelled pictures.
        layers: precisions to compare with FP32 layer by layer, each with the SQNR in dB that no tensor may fall below.
        latency_seconds: see `export.latency.measure_latency`; None times nothing.

    Raises:
        ExportError: the run has other weights than the bundle, no back-end runs here, or a picture is bad.
        BundleError: the bundle has no golden inputs for one of its graphs.
    """
    require_checkpoint(run, bundle.manifest.checkpoint_sha256, model=bundle.location)
    graphs = onnx_graphs(bundle)
    prepared = PreparedPictures(pictures, bundle.manifest.preprocess, pictures.content_sha256())
    with opened_backends(graphs, bundle.manifest, required_backends()) as backends:
        scores = with_engine_graph(collect_scores(run, prepared, backends), bundle, prepared)
        comparisons, broken = compare_scores(scores, bundle)
        golden = tuple(check_golden(bundle, backend, precision) for (precision, _), backend in backends.items())
        invariance = check_batches(backends, prepared, scores)
        latency = None
        if latency_seconds is not None:
            latency = time_backends(bundle, backends, prepared, seconds=latency_seconds)
    compared = compare_graphs(graphs, prepared, layers or {})
    return Verification(scores, comparisons, broken, golden, invariance, compared, latency)


def onnx_graphs(bundle: Bundle) -> dict[Precision, bytes]:
    """Content of the .onnx file of each precision that the bundle has."""
    artifacts = [bundle.manifest.onnx_artifact(precision) for precision in PRECISIONS]
    return {artifact.precision: bundle.read(artifact) for artifact in artifacts if artifact is not None}


def required_backends() -> list[str]:
    """Names of the back-ends that run here.

    Raises:
        ExportError: there is none.
    """
    if names := running_backends():
        return names
    raise ExportError(
        "verification",
        got="no back-end that runs here",
        wanted="onnxruntime or openvino",
        remedy='pip install "ntf-toolkit[cpu]"',
    )


def collect_scores(run: Path, pictures: PreparedPictures, backends: Backends) -> Scores:
    """Logits of PyTorch and of every back-end on the same pictures."""
    batches = track(pictures.batches(BATCH_SIZE), "scoring", total=-(-len(pictures) // BATCH_SIZE))
    reference, found = collect_logits(load_detector(run), backends, batches)
    labels = np.array([record.label for record in pictures.pictures.records])
    return Scores(labels, reference, load_calibration(run), found)


def with_engine_graph(scores: Scores, bundle: Bundle, pictures: PreparedPictures) -> Scores:
    """The scores, and those of the INT8 graph that engines are built from, on one back-end as at the export."""
    artifact = bundle.manifest.onnx_artifact("int8", "fp16")
    if artifact is None:
        return scores
    names = required_backends()
    backend = "openvino" if "openvino" in names else NODE_BY_NODE
    judge = Judge(pictures, scores.reference, scores.calibration, bundle.manifest, names, Budget.of(Options()))
    logits = judge.scores(Candidate("int8", bundle.read(artifact), "fp16"), backend)
    return replace(scores, found={**scores.found, (graph_name("int8", "fp16"), backend): logits})


def compare_scores(scores: Scores, bundle: Bundle) -> tuple[tuple[tuple[str, ParitySpec], ...], dict[str, list[str]]]:
    """Figures of every graph and back-end against PyTorch, and the limits that they break, in words.

    Where logits are not finite there are no figures: that is the limit which is broken.
    """
    comparisons, broken = [], {}
    reference = centred_thresholds(scores.calibration, scores.reference)
    for (graph, name), logits in scores.found.items():
        precision, _ = graph_parts(graph)
        if off := int((~np.isfinite(logits)).sum()):
            broken[f"{graph} on {name}"] = [f"{off} of {len(logits)} logits are not finite"]
            continue
        parity = compare_logits(
            logits,
            scores.reference,
            scores.labels,
            calibration=bundle.manifest.calibration[precision],
            reference_calibration=reference,
            backend=name,
            limits=LIMITS[precision],
        )
        comparisons.append((graph, parity))
        broken[f"{graph} on {name}"] = broken_limits(
            parity, LIMITS[precision], calibration=reference, logit_std=float(np.std(scores.reference))
        )
    return tuple(comparisons), broken


def check_batches(backends: Backends, pictures: PreparedPictures, scores: Scores) -> tuple[BatchInvariance, ...]:
    """Scores alone and in batches, of the first real picture, the first fake one and extreme pictures."""
    firsts = {}
    for label, name in enumerate(("real picture", "fake picture")):
        if len(found := np.flatnonzero(scores.labels == label)):
            firsts[name] = next(pictures_at(pictures, found[:1]).batches())[0]
    chosen = firsts | extreme_pictures(pictures.spec.height, pictures.spec.width)
    unit = unit_of_evidence(scores.calibration, float(np.std(scores.reference)))
    return tuple(
        check_batch_invariance(backend, chosen, precision=precision, unit=unit, batch=BATCH)
        for (precision, _), backend in track(backends.items(), "in batches", total=len(backends))
    )


def compare_graphs(
    graphs: Mapping[Precision, bytes], pictures: PreparedPictures, bounds_db: Mapping[Precision, float]
) -> tuple[LayerComparison, ...]:
    """Some graphs against the FP32 graph, tensor by tensor, on LAYER_PICTURES pictures spread over the collection.

    Args:
        graphs: content of the .onnx file of each precision.
        pictures: of the model.
        bounds_db: SQNR that no tensor may fall below, for each precision that is compared.
    """
    some = pictures.evenly_spaced(LAYER_PICTURES)
    models = {name: ModelProto.FromString(content) for name, content in graphs.items() if name in {"fp32", *bounds_db}}
    return tuple(
        compare_layers(models["fp32"], models[name], some.batches, precision=name, bound_db=bound_db)
        for name, bound_db in track(bounds_db.items(), "layer by layer", disable=not bounds_db)
    )


def time_backends(bundle: Bundle, backends: Backends, pictures: PreparedPictures, *, seconds: float) -> LatencySweep:
    """Times of every precision on every back-end, with the first pictures as they are stored, repeated where few."""
    most = max(BATCHES)
    some = pictures_at(pictures, np.arange(min(most, len(pictures))))
    images = np.stack(list(islice(cycle(np.concatenate(list(some.batches()))), most)))
    files = list(islice(cycle([record.read_bytes() for record in some.pictures.records]), most))
    sweeps = []
    for (precision, name), backend in track(backends.items(), "timing", total=len(backends)):
        with Detector.load(bundle.location, backend=name, precision=precision) as detector:
            sweeps.append(
                measure_latency(backend, detector, images, files, precision=precision, seconds=seconds, batches=BATCHES)
            )
    return joined_sweeps(sweeps)


def pictures_at(pictures: PreparedPictures, places: ArrayLike) -> PreparedPictures:
    """The pictures at some places of a collection."""
    records = tuple(pictures.pictures.records[place] for place in np.asarray(places))
    subset = replace(pictures.pictures, records=records)
    return PreparedPictures(subset, pictures.spec, subset.content_sha256())
