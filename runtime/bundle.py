"""A model bundle on disk, as a folder or one .zip file, checked before any back-end sees a byte of it."""

from __future__ import annotations

import hashlib
import itertools
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from runtime.bundle_zip import COPY_AGAIN, folder_in_zip, opened_zip, read_from_zip, write_zip
from runtime.errors import BundleError
from runtime.manifest import (
    MANIFEST_FILE,
    ArtifactSpec,
    ModelManifest,
    PicturesSpec,
    manifest_from_json,
    manifest_to_json,
)

FileSpec: TypeAlias = "ArtifactSpec | PicturesSpec"

# A manifest is some tens of kilobytes; anything near this is not one.
_MAX_MANIFEST_BYTES = 16 << 20
# Each is in memory as a whole.
_FILES_AT_ONCE = 2


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest, and its files on demand.

    Args:
        location: the folder or the .zip file.
        manifest: what the bundle says about itself.
        inside: for a .zip, the folder in it that holds the files ("" or ending in "/"); None for a folder.
    """

    location: Path
    manifest: ModelManifest
    inside: str | None

    def read(self, spec: FileSpec) -> bytes:
        """Content of one file, verified again, so that what is used is what was checked.

        Raises:
            BundleError: the file is missing, or differs from the manifest in size or hash.
        """
        if self.inside is None:
            data = _read_from_folder(self.location, spec.file, spec.size_bytes)
        else:
            with opened_zip(self.location) as archive:
                data = read_from_zip(archive, self.inside + spec.file, spec.size_bytes)
        _verify(self.location, spec, data)
        return data

    def path(self, spec: FileSpec) -> Path | None:
        """Path of one file, or None when the bundle is a .zip, which is never unpacked."""
        return self.location / spec.file if self.inside is None else None


def open_bundle(path: Path | str) -> Bundle:
    """Bundle of a folder or a .zip file, with every listed file verified against the manifest.

    Args:
        path: the folder with manifest.json, or a .zip of its files or of the folder itself.

    Raises:
        BundleError: nothing is there, the manifest is not valid, a file is missing or changed, or the archive has
            something in it that no bundle has.

    Note:
        Reads every file once, two at a time. Files that the manifest does not list are ignored.
    """
    location = Path(path)
    if location.is_dir():
        manifest = _manifest_of(_read_from_folder(location, MANIFEST_FILE, _MAX_MANIFEST_BYTES), location)
        bundle = Bundle(location, manifest, None)
    elif location.is_file():
        with opened_zip(location) as archive:
            inside = folder_in_zip(archive, location)
            data = read_from_zip(archive, inside + MANIFEST_FILE, _MAX_MANIFEST_BYTES)
        bundle = Bundle(location, _manifest_of(data, location), inside)
    else:
        _refuse(location, "nothing there", "a bundle folder or .zip file", "check the path, or export a model")
    # Hashing leaves the interpreter to others, and is a quarter of the time to a first verdict.
    with ThreadPoolExecutor(_FILES_AT_ONCE, "bundle") as executor:
        deque(executor.map(bundle.read, bundle.manifest.files()), maxlen=0)
    return bundle


def pack_bundle(model: Path | str, target: Path | str) -> Bundle:
    """The bundle as one .zip, written, read back and opened; equal bundles give equal bytes.

    Args:
        model: a bundle, folder or .zip; files that its manifest does not list are left out.
        target: the .zip file to write; an older bundle there is replaced.

    Raises:
        BundleError: the bundle is not sound, or `target` is something else than a bundle in a .zip.
    """
    bundle, target = open_bundle(model), Path(target)
    if target.suffix != ".zip":
        _refuse(target, "another ending", "a name that ends in .zip", "choose such a name")
    if target.exists():
        _require_zipped_bundle(target)
    manifest = manifest_to_json(bundle.manifest).encode()
    files = ((spec.file, bundle.read(spec)) for spec in bundle.manifest.files())
    try:
        write_zip(target, itertools.chain([(MANIFEST_FILE, manifest)], files))
    except OSError as error:
        _refuse(target, f"a place that cannot be written ({error.strerror})", "a writable folder", "choose another")
    return open_bundle(target)


def newest_bundle(models: Path) -> Path:
    """Bundle under `models` whose manifest (or .zip file) was written last; ties go to the last name.

    Names that begin with a dot are what a killed export or packing left, and are passed over.

    Raises:
        BundleError: there is none.
    """
    stamps = {path.parent: path.stat().st_mtime_ns for path in models.glob(f"[!.]*/{MANIFEST_FILE}")}
    stamps |= {path: path.stat().st_mtime_ns for path in models.glob("[!.]*.zip")}
    if not stamps:
        _refuse(models, "no bundle in it", f"a folder with {MANIFEST_FILE}, or a .zip", "name one with --model")
    return max(stamps, key=lambda path: (stamps[path], path.name))


def _refuse(subject: object, got: str, wanted: str, remedy: str) -> NoReturn:
    raise BundleError(str(subject), got=got, wanted=wanted, remedy=remedy)


def _require_zipped_bundle(target: Path) -> None:
    """Nothing for a .zip with a manifest in it, sound or not; whatever else is there is not overwritten."""
    try:
        with opened_zip(target) as archive:
            if MANIFEST_FILE in (name.split("/")[-1] for name in archive.namelist()):
                return
    except BundleError as error:
        _refuse(target, error.got, "a new name, or an earlier bundle", "choose another name")
    _refuse(target, "an archive that is no bundle", "a new name, or an earlier bundle", "choose another name")


def _manifest_of(data: bytes, location: Path) -> ModelManifest:
    try:
        return manifest_from_json(data.decode())
    except UnicodeDecodeError as error:
        _refuse(location / MANIFEST_FILE, f"bytes that are not UTF-8 ({error})", "a JSON text", COPY_AGAIN)


def _verify(location: Path, spec: FileSpec, data: bytes) -> None:
    subject = location / spec.file
    if len(data) != spec.size_bytes:
        _refuse(subject, f"at least {len(data)} bytes", f"{spec.size_bytes} bytes", COPY_AGAIN)
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.sha256:
        _refuse(subject, f"SHA-256 {digest}", f"{spec.sha256} as in the manifest", COPY_AGAIN)


def _read_from_folder(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    try:
        # A link could lead out of the folder, and a bundle is copied without what it points to.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "something that is no regular file", "a file of the bundle", COPY_AGAIN)
        with path.open("rb") as file:
            # The limit is what the manifest claims, and Python reserves what it is asked to read.
            return file.read(min(limit, status.st_size) + 1)
    except FileNotFoundError:
        _refuse(path, "no such file", "a complete bundle", COPY_AGAIN)
    except OSError as error:
        _refuse(path, f"a file that cannot be read ({error.strerror})", "a readable file", "check its permissions")
