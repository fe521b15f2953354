"""Writing a model bundle: what is kept of an older one, golden inputs, and the write itself."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError
from export.folder_swap import replaced_folder, restore_folder
from runtime.backends import Backend
from runtime.bundle import Bundle, open_bundle
from runtime.errors import BundleError
from runtime.manifest import (
    MANIFEST_FILE,
    ArtifactSpec,
    CalibrationListSpec,
    GoldenSpec,
    ModelManifest,
    Precision,
    manifest_from_json,
    manifest_to_json,
    save_manifest,
)

GOLDEN_FILE = "golden.npz"
CALIBRATION_FILE = "calibration.json"
GOLDEN_PICTURES = 4
# What an export writes, for a folder whose manifest cannot be read.
_OWN_NAMES = (MANIFEST_FILE, GOLDEN_FILE, CALIBRATION_FILE, "model.*.onnx", "model.*.engine")


def onnx_file(precision: str, remainder: str = "fp32") -> str:
    """File name of the ONNX graph of a precision; an INT8 graph with an FP16 remainder is for engines."""
    return f"model.{precision}.onnx" if remainder == "fp32" else f"model.{precision}-{remainder}.onnx"


def engine_file(precision: str, flavour: str, target: str) -> str:
    """File name of an engine."""
    return f"model.{precision}.{flavour}-{target}.engine"


def existing_bundle(folder: Path, checkpoint_sha256: str) -> Bundle | None:
    """The sound bundle of the same checkpoint that stands in a folder; None where there is nothing to keep.

    Raises:
        ExportError: the folder holds something that is not a bundle or not of it, which is not overwritten.
    """
    restore_folder(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST_FILE).is_file():
        raise ExportError(
            f"--model {folder}",
            got="a path that holds something else than a model bundle",
            wanted="a new folder, or an earlier bundle",
            remedy="choose another folder",
        )
    require_only_bundle(folder)
    try:
        bundle = open_bundle(folder)
    except BundleError as error:
        print(f"note: the bundle in {folder} is damaged and is replaced as a whole ({error})")
        return None
    return bundle if bundle.manifest.checkpoint_sha256 == checkpoint_sha256 else None


def require_only_bundle(folder: Path, timing_cache: Path | None = None) -> None:
    """Nothing where a folder has only files of its bundle in it, or is not there: it is replaced as a whole.

    Args:
        folder: of a bundle, sound or not.
        timing_cache: file that a build is about to write, which must not lie in the folder either.

    Raises:
        ExportError: naming the first other file, which would be lost.
    """
    strangers = _strangers(folder)
    if timing_cache is not None and timing_cache.resolve().is_relative_to(folder.resolve()):
        strangers.append(timing_cache.name)
    if strangers:
        raise ExportError(
            str(folder),
            got=f"{strangers[0]} in it, which would be lost with the old folder",
            wanted="a bundle and nothing else",
            remedy="move that file elsewhere",
        )


def _strangers(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        manifest = manifest_from_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        own: Iterable[str] = (MANIFEST_FILE, *(spec.file for spec in manifest.files()))
    except (BundleError, OSError, UnicodeDecodeError):
        own = _OWN_NAMES
    return sorted(p.name for p in folder.iterdir() if not any(fnmatch(p.name, name) for name in own))


def kept_artifacts(
    old: Bundle | None, replaced: Iterable[str], new_graphs: Mapping[Precision, bytes]
) -> list[tuple[ArtifactSpec, bytes]]:
    """Artifacts of the old bundle that stay valid: other precisions, and engines whose graph is the same still.

    Args:
        old: bundle of the same checkpoint, or None.
        replaced: precisions that are made anew, with their engines.
        new_graphs: content of the ONNX graphs that are made anew, by precision.
    """
    if old is None:
        return []
    gone = set(replaced)
    changed = {
        artifact.precision
        for artifact in old.manifest.artifacts
        if artifact.format == "onnx"
        and artifact.precision in new_graphs
        and hashlib.sha256(new_graphs[artifact.precision]).hexdigest() != artifact.sha256
    }
    return [
        (artifact, old.read(artifact))
        for artifact in old.manifest.artifacts
        if artifact.precision not in gone | changed
        and not (artifact.format == "onnx" and artifact.precision in new_graphs)
    ]


def golden_images(height: int, width: int) -> NDArray[np.uint8]:
    """GOLDEN_PICTURES made pictures (4, H, W, 3): noise, waves, a ramp and black. Nobody's photograph is shipped."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 127.5 + 127.5 * np.sin(rows / 5.0) * np.cos(columns / 9.0)
    ramp = (rows + columns) * (255.0 / max(1, height + width - 2))
    grey = np.stack([waves, ramp, np.zeros((height, width))]).round().astype(np.uint8)
    noise = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return np.concatenate([noise, np.repeat(grey[..., None], 3, axis=-1)])


def golden_content(images: NDArray[np.uint8], backends: Mapping[str, Backend]) -> bytes:
    """Bytes of golden.npz: `images`, and `<precision>.<output>` of each precision.

    Args:
        images: from `golden_images`.
        backends: the reference back-end of each precision.
    """
    arrays: dict[str, NDArray[np.generic]] = {"images": images}
    for precision, backend in sorted(backends.items()):
        outputs = backend.infer(images)._asdict()
        arrays |= {f"{precision}.{name}": values for name, values in outputs.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def golden_spec(content: bytes) -> GoldenSpec:
    """What the manifest says of golden.npz."""
    return GoldenSpec(GOLDEN_FILE, hashlib.sha256(content).hexdigest(), len(content), GOLDEN_PICTURES)


def calibration_list_spec(content: bytes, pictures: int) -> CalibrationListSpec:
    """What the manifest says of calibration.json.

    Args:
        content: of the file.
        pictures: how many it lists.
    """
    return CalibrationListSpec(CALIBRATION_FILE, hashlib.sha256(content).hexdigest(), len(content), pictures)


def write_bundle(folder: Path, manifest: ModelManifest, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle beside `folder`, check it, and put it in its place.

    Args:
        folder: where the bundle will stand; an older bundle there is replaced.
        manifest: complete.
        files: content of every file the manifest lists.

    Raises:
        ExportError: the disk is full, the folder cannot be written, or something else than a bundle is in it; what
            was there stands as it was.
        BundleError: what was written cannot be read back; the old bundle stands as it was.
    """
    with replaced_folder(folder) as new:
        require_only_bundle(folder)
        for name, content in files.items():
            write_file(new / name, content)
        save_manifest(manifest, new)
        open_bundle(new)
    return open_bundle(folder)


def sorted_artifacts(artifacts: Iterable[ArtifactSpec]) -> tuple[ArtifactSpec, ...]:
    """Artifacts in the order of their file names, so that equal bundles have equal manifests."""
    return tuple(sorted(artifacts, key=lambda artifact: artifact.file))


def write_file(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def carried_facts(manifest: ModelManifest, artifact: ArtifactSpec) -> dict[str, str]:
    """What a graph must not lose where it leaves its bundle, as text: how to read its logits, and where it is from.

    Args:
        manifest: of the bundle.
        artifact: the graph or engine.
    """
    calibration = manifest.calibration[artifact.precision]
    return {
        "model": manifest.name,
        "precision": artifact.precision,
        "labels": ",".join(manifest.labels),
        "temperature": repr(calibration.temperature),
        "bias": repr(calibration.bias),
        "real_threshold": repr(calibration.real_threshold),
        "fake_threshold": repr(calibration.fake_threshold),
        "source_file": artifact.file,
        "source_sha256": artifact.sha256,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "manifest_sha256": hashlib.sha256(manifest_to_json(manifest).encode()).hexdigest(),
        "tool_version": manifest.tool_version,
    }
