"""A tiny model bundle made by hand: the graph contract without any training, and its NumPy twin as the oracle."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle import open_bundle
from runtime.manifest import (
    LABELS,
    OUTPUTS,
    SCHEMA_VERSION,
    ArtifactSpec,
    CalibrationSpec,
    EngineSpec,
    GoldenSpec,
    ModelManifest,
    ParitySpec,
    ProfileSpec,
    save_manifest,
)
from runtime.preprocess import PreprocessSpec

SIZE = 16  # pixels; 4x4 patches of 4 pixels
PATCH = 4
EMBEDDING_DIM = 128

# Logit offset of each precision, so that a test can tell which graph ran.
PRECISION_OFFSET = {"fp32": 0.0, "fp16": 10.0, "int8": 20.0}

_rng = np.random.default_rng(7)
_PATCH_WEIGHT = _rng.normal(size=(8, 3, PATCH, PATCH)).astype(np.float32) / 7
_HEAD_WEIGHT = _rng.normal(size=(8, 1)).astype(np.float32)
_EMBED_WEIGHT = _rng.normal(size=(8, EMBEDDING_DIM)).astype(np.float32)
_TRACE = _rng.normal(size=EMBEDDING_DIM).astype(np.float32)
MEAN_TRACE = (_TRACE / np.linalg.norm(_TRACE)).astype(np.float32)

CALIBRATION = CalibrationSpec(
    temperature=0.5,
    bias=-0.5,
    real_threshold=0.22,
    fake_threshold=0.31,
    real_flagged_rate=0.01,
    fake_missed_rate=0.05,
)


def numpy_outputs(images, *, offset=0.0):
    """Outputs of the tiny graph for images (N, 16, 16, 3) uint8, written out in float64 NumPy."""
    x = images.astype(np.float64) / 255 - 0.5
    cells = SIZE // PATCH
    patches = x.reshape(-1, cells, PATCH, cells, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    features = np.maximum(np.einsum("nabcij,kcij->nkab", patches, _PATCH_WEIGHT.astype(np.float64)), 0)
    pooled = features.mean((2, 3))
    embeddings = pooled @ _EMBED_WEIGHT
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return {
        "logits": (pooled @ _HEAD_WEIGHT)[:, 0] + offset,
        "trace_similarity": embeddings @ MEAN_TRACE.astype(np.float64),
        "embeddings": embeddings,
        "evidence": np.einsum("nkab,k->nab", features, _HEAD_WEIGHT[:, 0]) + offset,
    }


def tiny_graph(*, offset=0.0, batch="N", input_type=TensorProto.UINT8, rename=None):
    """Serialised ONNX graph that keeps the contract; the arguments break it on purpose."""
    constants = {
        "scale": np.float32(1 / 255),
        "half": np.float32(0.5),
        "patch": _PATCH_WEIGHT,
        "head": _HEAD_WEIGHT,
        "cell": _HEAD_WEIGHT.reshape(1, 8, 1, 1),
        "embed": _EMBED_WEIGHT,
        "trace": MEAN_TRACE[:, None],
        "offset": np.float32(offset),
        "one": np.array([1], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        node("Mul", ["float", "scale"], ["unit"]),
        node("Sub", ["unit", "half"], ["centred"]),
        node("Transpose", ["centred"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Conv", ["nchw", "patch"], ["conv"], strides=[PATCH, PATCH]),
        node("Relu", ["conv"], ["features"]),
        node("ReduceMean", ["features"], ["pooled"], axes=[2, 3], keepdims=0),
        node("MatMul", ["pooled", "head"], ["logit_column"]),
        node("Squeeze", ["logit_column", "one"], ["raw"]),
        node("Add", ["raw", "offset"], ["logits"]),
        node("MatMul", ["pooled", "embed"], ["wide"]),
        node("ReduceL2", ["wide"], ["norm"], axes=[1], keepdims=1),
        node("Div", ["wide", "norm"], ["embeddings"]),
        node("MatMul", ["embeddings", "trace"], ["similarity_column"]),
        node("Squeeze", ["similarity_column", "one"], ["trace_similarity"]),
        node("Conv", ["features", "cell"], ["cells"]),
        node("Squeeze", ["cells", "one"], ["raw_evidence"]),
        node("Add", ["raw_evidence", "offset"], ["evidence"]),
    ]
    cells = SIZE // PATCH
    shapes = {
        "logits": [batch],
        "trace_similarity": [batch],
        "embeddings": [batch, EMBEDDING_DIM],
        "evidence": [batch, cells, cells],
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", input_type, [batch, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in OUTPUTS],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    for old, new in (rename or {}).items():
        model = onnx.compose.add_prefix(model, "")  # a copy
        for item in [*model.graph.input, *model.graph.output]:
            item.name = new if item.name == old else item.name
        for item in model.graph.node:
            item.input[:] = [new if name == old else name for name in item.input]
            item.output[:] = [new if name == old else name for name in item.output]
    return model.SerializeToString(deterministic=True)


def parity(*, passed=True, backend="onnxruntime"):
    """A parity record."""
    return ParitySpec(backend, "torch fp32", 8, 1e-4, 1e-5, 0.0, 0.0, 0, 0, passed)


def write_bundle(folder, *, precisions=("fp32",), parities=None, graphs=None, **changes):
    """A bundle in `folder` and its manifest.

    Args:
        folder: made when it is not there.
        precisions: one ONNX graph for each.
        parities: parity records for each precision; none by default.
        graphs: serialised graphs that replace the tiny one, by precision.
        changes: fields of the manifest to replace.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = []
    for precision in precisions:
        data = (graphs or {}).get(precision) or tiny_graph(offset=PRECISION_OFFSET[precision])
        (folder / f"model.{precision}.onnx").write_bytes(data)
        artifacts.append(_artifact(precision, data, (parities or {}).get(precision, ())))
    manifest = ModelManifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        encoder="tiny",
        preprocess=PreprocessSpec(height=SIZE, width=SIZE),
        labels=LABELS,
        outputs=OUTPUTS,
        embedding_dim=EMBEDDING_DIM,
        evidence_shape=(SIZE // PATCH, SIZE // PATCH),
        calibration={
            name: replace(
                CALIBRATION,
                real_threshold=CALIBRATION.real_threshold + PRECISION_OFFSET[name],
                fake_threshold=CALIBRATION.fake_threshold + PRECISION_OFFSET[name],
            )
            for name in precisions
        },
        mean_trace=tuple(float(value) for value in MEAN_TRACE),
        artifacts=tuple(artifacts),
        golden=_write_golden(folder),
        checkpoint_sha256="0" * 64,
        training_data_sha256="1" * 64,
        calibration_data_sha256="2" * 64,
        calibration_pictures=16,
        tool_version="0.0.0",
        tool_commit="unknown",
    )
    manifest = replace(manifest, **changes)
    save_manifest(manifest, folder)
    return manifest


def add_engine(folder, content, *, version_compatible=False, tf32=False, **changes):
    """The bundle in `folder` with an engine of its first graph beside it, as TensorRT 10.9 on an L4 builds it.

    Args:
        folder: of a bundle.
        content: of the engine's file.
        version_compatible: of the engine.
        tf32: whether it may compute in TF32.
        changes: fields of the engine's artifact to replace.
    """
    manifest = open_bundle(folder).manifest
    source = manifest.artifacts[0]
    built = EngineSpec(source.file, source.sha256, "c" * 64, "NVIDIA L4", 256, version_compatible, False, {}, tf32)
    engine = replace(
        source, file=f"model.{source.precision}.engine", format="engine", sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content), opset=None, profile=ProfileSpec(2, 4, 8), flavour="trt", targets=("sm89",),
        builder="tensorrt 10.9.0.34", parity=(), engine=built,
    )  # fmt: skip
    engine = replace(engine, **changes)
    (Path(folder) / engine.file).write_bytes(content)
    save_manifest(replace(manifest, artifacts=(*manifest.artifacts, engine)), folder)
    return open_bundle(folder)


def zip_bundle(folder, target, *, inside=""):
    """The bundle folder as a .zip file; `inside` is a folder in it, ending in "/"."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(Path(folder).iterdir()):
            archive.write(path, inside + path.name)
    return Path(target)


def random_images(count, *, seed=0):
    """(count, 16, 16, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def _artifact(precision, data, parities):
    return ArtifactSpec(
        file=f"model.{precision}.onnx",
        format="onnx",
        precision=precision,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        opset=13,
        profile=None,
        flavour=None,
        targets=(),
        builder="by hand",
        versions={},
        higher_precision_layers={},
        parity=tuple(parities),
    )


def _write_golden(folder):
    images = random_images(4, seed=3)
    stream = io.BytesIO()
    np.savez(stream, images=images, **{"fp32.logits": numpy_outputs(images)["logits"].astype(np.float32)})
    data = stream.getvalue()
    (folder / "golden.npz").write_bytes(data)
    return GoldenSpec("golden.npz", hashlib.sha256(data).hexdigest(), len(data), len(images))
