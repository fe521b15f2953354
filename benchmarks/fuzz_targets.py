"""What is fuzzed: valid seeds, how they are made wrong, and what reading a mutant may do: succeed or refuse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz_server import ServerReader, valid_requests, wrong_request
from benchmarks.mutation import mutated_bytes, mutated_json, mutated_zip, with_png_checksums
from benchmarks.pictures import photograph
from runtime.backends.base import Outputs
from runtime.bundle import Bundle, open_bundle, pack_bundle
from runtime.decode import decode_picture
from runtime.errors import BundleError, CollectionError, NTFError, PictureError
from runtime.golden import check_golden
from runtime.limits import MAX_PIXELS
from runtime.manifest import ModelManifest, manifest_from_json, manifest_to_json
from runtime.onnx_guard import require_self_contained
from runtime.preprocess import prepare
from runtime.scoring.tar_shards import member_part, pictures_in_shard
from runtime.serve.request_errors import RequestError
from runtime.strict_json import canonical_json
from tests.bundle_fixtures import write_bundle


class Escape(Exception):
    """Something outside a bundle was read or written."""


@dataclass(frozen=True)
class Target:
    """One reader under test.

    Args:
        name: for the command line and the report.
        share: of all inputs.
        seeds: valid inputs.
        mutate: a wrong input from a valid one.
        read: reads an input; whatever it raises but `refusals` is a finding.
        refusals: what the reader is documented to raise.
    """

    name: str
    share: float
    seeds: Sequence[bytes]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[bytes], None]
    refusals: tuple[type[NTFError], ...]

    def outcome(self, data: bytes) -> str:
        """ "accepted", or the name of the refusal.

        Raises:
            Exception: whatever else the reader raises.
        """
        try:
            self.read(data)
        except self.refusals as error:
            return type(error).__name__
        return "accepted"


def targets(folder: Path) -> list[Target]:
    """Every target.

    Args:
        folder: for the files that readers need; on a memory file system it is fastest.
    """
    pictures = _picture_seeds()
    bundle = folder / "seed"
    # Two values of a trace say as much as 128, and take less time.
    manifest = write_bundle(bundle, embedding_dim=2, mean_trace=(0.6, 0.8))
    text = manifest_to_json(manifest).encode()
    zips = [pack_bundle(bundle, folder / "seed.zip").location.read_bytes(), _deflated(bundle)]
    npz = (bundle / "golden.npz").read_bytes()
    golden = partial(_read_golden, folder, manifest)
    graph = (bundle / "model.fp32.onnx").read_bytes()
    shard = _shard(pictures[:3])
    requests = valid_requests(pictures, manifest.name, manifest.preprocess.height)
    return [
        Target("pictures", 0.5, pictures, partial(_wrong_picture, pictures), _read_picture, (PictureError,)),
        Target("manifest", 0.15, [text], _wrong_manifest, _read_manifest, (BundleError,)),
        Target("bundle-zip", 0.05, zips, _wrong_zip, partial(_read_zip, folder), (BundleError,)),
        Target("bundle-folder", 0.05, [text], _wrong_manifest, _FolderReader(folder, bundle), (BundleError,)),
        Target("graph", 0.05, [graph], mutated_bytes, _read_graph, (BundleError,)),
        Target("golden", 0.05, [npz, _deflated_npz(npz)], _wrong_npz, golden, (BundleError,)),
        Target(
            "shard", 0.05, [shard], partial(_wrong_shard, shard), partial(_read_shard, folder),
            (CollectionError, PictureError),
        ),
        Target(
            "server", 0.1, requests, partial(wrong_request, pictures, manifest.name),
            ServerReader(bundle, _Answers()), (RequestError,),
        ),
    ]  # fmt: skip


# Pictures


def _picture_seeds() -> list[bytes]:
    """Small pictures in each format, with what makes decoders take other ways."""
    rgb = Image.fromarray(photograph(24, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    transparent = rgb.convert("RGBA")
    transparent.putalpha(128)
    grey16 = Image.fromarray((np.arange(24 * 20, dtype=np.uint16) * 130).reshape(24, 20))
    palette = rgb.quantize(16)
    variants: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {"quality": 30}), (rgb, "JPEG", {"restart_marker_rows": 1}),
        (rgb, "PNG", {"exif": exif}), (palette, "PNG", {"transparency": 0}), (grey16, "PNG", {}),
        (transparent, "PNG", {}), (rgb.convert("1"), "PNG", {}), (rgb, "PNG", frames),
        (rgb, "WEBP", {}), (transparent, "WEBP", {"lossless": True, "exif": exif}), (rgb, "WEBP", frames),
        (rgb, "GIF", {}), (rgb, "GIF", frames), (palette, "GIF", {"transparency": 0}),
        (rgb, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb, "TIFF", {"compression": "jpeg"}),
        (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}), (grey16, "TIFF", {}), (rgb.convert("1"), "TIFF",
        {"compression": "group4"}), (rgb, "TIFF", frames),
        (rgb, "BMP", {}), (palette, "BMP", {}), (rgb.convert("1"), "BMP", {}), (rgb, "PPM", {}), (grey16, "PPM", {}),
    ]  # fmt: skip
    Image.init()
    return [_encoded(image, form, options) for image, form, options in variants if form in Image.SAVE]


def _encoded(image: Image.Image, form: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _wrong_picture(others: Sequence[bytes], data: bytes, random: Random) -> bytes:
    mutant = mutated_bytes(data, random, others)
    return with_png_checksums(mutant) if random.random() < 0.8 else mutant


def _read_picture(data: bytes) -> None:
    pixels = decode_picture(data)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


# Bundles


def sealed_manifest(plain: Any) -> bytes:
    """Text of a manifest with the hash that it should have, so that a reader looks at what it says."""
    if not isinstance(plain, dict):
        return json.dumps(plain).encode()
    plain = {key: value for key, value in plain.items() if key != "manifest_sha256"}
    try:
        digest = hashlib.sha256(canonical_json(plain).encode()).hexdigest()
        return canonical_json(plain | {"manifest_sha256": digest}).encode()
    except ValueError:  # an infinity, or half of a surrogate pair, which no canonical text holds
        return json.dumps(plain | {"manifest_sha256": "0" * 64}).encode()


def _wrong_manifest(data: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return mutated_bytes(data, random)
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):  # a mutant that is made wrong once more
        return mutated_bytes(data, random)
    return sealed_manifest(mutated_json(plain, random))


def _read_manifest(data: bytes) -> None:
    manifest = manifest_from_json(data.decode("utf-8", "replace"))
    assert manifest_to_json(manifest).encode() == data
    # The first thing that is done with what a manifest says: it must not ask for the memory of a machine.
    assert prepare(np.zeros((3, 5, 3), np.uint8), manifest.preprocess).nbytes <= 1 << 26


def _wrong_zip(data: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return mutated_bytes(data, random)
    try:
        return mutated_zip(data, random)
    except Exception:  # a mutant that is no .zip any more
        return mutated_bytes(data, random)


def _read_zip(folder: Path, data: bytes) -> None:
    place = folder / "zip"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "model.zip").write_bytes(data)
    try:
        open_bundle(place / "model.zip")
    finally:
        if os.listdir(place) != ["model.zip"]:
            raise Escape(f"{os.listdir(place)} beside the archive")


class _FolderReader:
    """Opens a folder with a given manifest in it, whose files may be links, folders or pipes.

    The first byte of the manifest's hash chooses what becomes of the graph, so that an input says it all.
    """

    def __init__(self, folder: Path, bundle: Path) -> None:
        self._place = folder / "folder"
        self._bundle = bundle
        self._outside = folder / "outside.onnx"
        shutil.copyfile(bundle / "model.fp32.onnx", self._outside)

    def __call__(self, data: bytes) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._bundle, self._place)
        (self._place / "manifest.json").write_bytes(data)
        kind = hashlib.sha256(data).digest()[0] % 5
        graph = self._place / "model.fp32.onnx"
        if kind > 1:
            graph.unlink()
        if kind == 2:
            graph.symlink_to(self._outside)
        elif kind == 3:
            os.mkfifo(graph)
        elif kind == 4:
            graph.mkdir()
        manifest = open_bundle(self._place).manifest
        if kind > 1 and any(spec.file == graph.name for spec in manifest.files()):
            raise Escape(f"a bundle with a graph of kind {kind} was opened")


# Golden inputs


def _deflated(bundle: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(bundle.iterdir()):
            archive.write(path, path.name)
    return stream.getvalue()


def _deflated_npz(npz: bytes) -> bytes:
    stream = io.BytesIO()
    with np.load(io.BytesIO(npz)) as arrays:
        np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _wrong_npz(data: bytes, random: Random) -> bytes:
    if random.random() < 0.4:
        return _wrong_zip(data, random)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # a mutant that is no .zip any more
        return mutated_bytes(data, random)
    chosen = random.choice(list(entries))
    # The header of an array: its type, order and shape.
    entries[chosen] = mutated_bytes(entries[chosen][:128], random) + entries[chosen][128:]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _read_graph(data: bytes) -> None:
    require_self_contained(data, "model.onnx")


class _Answers:
    """A back-end that gives zeros, for checks of what it is compared with."""

    name, version, device = "onnxruntime", "0", "cpu"

    def infer(self, images: Any) -> Outputs:
        count = len(images)
        return Outputs(*(np.zeros(shape, np.float32) for shape in ((count,), (count,), (count, 2), (count, 4, 4))))

    def close(self) -> None:
        pass


def _read_golden(folder: Path, manifest: ModelManifest, data: bytes) -> None:
    (folder / "golden.npz").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    spec = replace(manifest.golden, sha256=digest, size_bytes=max(1, len(data)))
    check_golden(Bundle(folder, replace(manifest, golden=spec), None), _Answers(), "fp32")


# Shards


def _shard(pictures: Sequence[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, data in enumerate(pictures):
            info = tarfile.TarInfo(f"{number:06d}.jpg" if number else f"{'long/' * 40}ü.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _wrong_shard(seed: bytes, data: bytes, random: Random) -> bytes:
    """A tar file made wrong; mostly in its headers, whose checksums are put right."""
    mutant = bytearray(mutated_bytes(data, random, [seed]))
    if random.random() < 0.7 and len(mutant) >= 512:
        place = 512 * random.randrange(len(mutant) // 512)
        header = mutant[place : place + 512]
        header[:] = mutated_bytes(bytes(header), random)[:512].ljust(512, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        mutant[place : place + 512] = header
    return bytes(mutant)


def _read_shard(folder: Path, data: bytes) -> None:
    path = folder / "shard.tar"
    path.write_bytes(data)
    for member in pictures_in_shard(str(path)):
        assert len(member_part(str(path), member).read()) == member.size_bytes
