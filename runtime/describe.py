"""A manifest written out for people: `ntf inspect`, which needs no back-end."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.manifest import ArtifactSpec, EngineSpec, ModelManifest, ParitySpec


def describe_manifest(manifest: ModelManifest) -> str:
    """Everything in a manifest as indented text."""
    size, golden, listed = manifest.preprocess, manifest.golden, manifest.calibration_list
    rows, columns = manifest.evidence_shape
    lines = [
        f"model            {manifest.name}",
        f"encoder          {manifest.encoder}",
        f"schema           {manifest.schema_version}, written by ntf-toolkit {manifest.tool_version}"
        f" (commit {manifest.tool_commit})",
        f"input            {size.height}x{size.width} {size.color}, {size.pad} padding, {size.crop} crop,"
        f" mean {_numbers(size.mean)}, std {_numbers(size.std)} inside the graph",
        f"outputs          {', '.join(manifest.outputs)};"
        f" embeddings of {manifest.embedding_dim}, evidence of {rows}x{columns}",
        f"labels           {', '.join(f'{index} {label}' for index, label in enumerate(manifest.labels))}",
        f"mean trace       {len(manifest.mean_trace)} values",
        f"weights          sha256 {manifest.checkpoint_sha256}",
        f"training data    sha256 {manifest.training_data_sha256}",
        f"calibration data sha256 {manifest.calibration_data_sha256}, {manifest.calibration_pictures} pictures",
        f"golden inputs    {'none' if golden is None else f'{golden.file}, {golden.pictures} pictures'}",
        f"INT8 ranges from {'none' if listed is None else f'{listed.file}, {listed.pictures} pictures'}",
        *_calibration_lines(manifest),
    ]
    for artifact in manifest.artifacts:
        lines += _artifact_lines(artifact)
    return "\n".join(lines)


def _calibration_lines(manifest: ModelManifest) -> Iterator[str]:
    yield "calibration"
    for precision, spec in sorted(manifest.calibration.items()):
        yield (
            f"  {precision}: logit / {spec.temperature:.6g} {spec.bias:+.6g}; real up to {spec.real_threshold:.6g}"
            f" ({100 * spec.fake_missed_rate:g} % of fakes missed), fake above {spec.fake_threshold:.6g}"
            f" ({100 * spec.real_flagged_rate:g} % of real flagged), {spec.threshold_rule} thresholds"
        )


def _artifact_lines(artifact: ArtifactSpec) -> Iterator[str]:
    yield f"artifact {artifact.file}"
    kind = f"opset {artifact.opset}" if artifact.format == "onnx" else f"engine {artifact.flavour}"
    if artifact.remainder != "fp32":
        kind += f", for engines: {artifact.remainder} between the integer layers"
    yield f"  {artifact.precision}, {artifact.format}, {kind}, {artifact.size_bytes} bytes"
    yield f"  sha256 {artifact.sha256}"
    yield f"  built by {artifact.builder}" + "".join(f", {k} {v}" for k, v in sorted(artifact.versions.items()))
    if artifact.format == "engine":
        yield f"  targets {', '.join(artifact.targets) or 'not stated'}; the back-end trt runs it there"
    if artifact.engine is not None:
        yield from _engine_lines(artifact.engine)
    if artifact.profile is not None:
        profile = artifact.profile
        yield f"  batch {profile.min_batch} / {profile.opt_batch} / {profile.max_batch} (min / opt / max)"
    for layer, reason in sorted(artifact.higher_precision_layers.items()):
        yield f"  kept above {artifact.precision}: {layer} ({reason})"
    for parity in artifact.parity:
        yield _parity_line(parity)
    if not artifact.parity:
        yield "  parity not checked"


def _engine_lines(engine: EngineSpec) -> Iterator[str]:
    yield f"  from {engine.source}, sha256 {engine.source_sha256}"
    workspace = "no limit" if engine.workspace_mib is None else f"{engine.workspace_mib} MiB"
    yield (
        f"  built {'without a GPU' if engine.gpu is None else f'on {engine.gpu}'}, workspace {workspace},"
        f" {'' if engine.version_compatible else 'not '}version compatible,"
        f" {'' if engine.hardware_compatible else 'not '}hardware compatible,"
        f" FP32 products {'may be rounded to TF32' if engine.tf32 else 'in full'}"
    )
    yield f"  cache key {engine.cache_key}"
    counted = sorted(engine.layers.items(), key=lambda item: (-item[1], item[0]))
    yield f"  layers {', '.join(f'{count} {what}' for what, count in counted) or 'not stated by the build'}"


def _parity_line(parity: ParitySpec) -> str:
    average = "n/a" if parity.ap_change_points is None else f"{parity.ap_change_points:+.3f} points"
    return (
        f"  parity {'passed' if parity.passed else 'FAILED'}: {parity.backend} against {parity.reference},"
        f" {parity.pictures} pictures, logit difference {parity.logit_diff_max:.3g} max"
        f" {parity.logit_diff_mean:.3g} mean, AP {average}, accuracy {parity.accuracy_change_points:+.3f} points,"
        f" {parity.verdict_flips} verdict flips, {parity.opposite_verdicts} of them between real and fake"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
