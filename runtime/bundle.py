"""A model bundle on disk, as a folder or one .zip file, checked before any back-end sees a byte of it."""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from runtime.errors import BundleError
from runtime.manifest import MANIFEST_FILE, ArtifactSpec, ModelManifest, PicturesSpec, manifest_from_json

FileSpec: TypeAlias = "ArtifactSpec | PicturesSpec"

# A manifest is some tens of kilobytes; anything near this is not one.
_MAX_MANIFEST_BYTES = 16 << 20
_COPY_AGAIN = "copy the bundle again, or export the model again"


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
            with _opened_zip(self.location) as archive:
                data = _read_from_zip(archive, self.inside + spec.file, spec.size_bytes)
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
        BundleError: nothing is there, the manifest is not valid, a file is missing or changed, or a name in
            the archive leaves it.

    Note:
        Reads every file once, one at a time. Files that the manifest does not list are ignored.
    """
    location = Path(path)
    if location.is_dir():
        manifest = _manifest_of(_read_from_folder(location, MANIFEST_FILE, _MAX_MANIFEST_BYTES), location)
        bundle = Bundle(location, manifest, None)
    elif location.is_file():
        with _opened_zip(location) as archive:
            inside = _folder_in_zip(archive, location)
            data = _read_from_zip(archive, inside + MANIFEST_FILE, _MAX_MANIFEST_BYTES)
        bundle = Bundle(location, _manifest_of(data, location), inside)
    else:
        _refuse(location, "nothing there", "a bundle folder or .zip file", "check the path, or export a model")
    for spec in bundle.manifest.files():
        bundle.read(spec)
    return bundle


def newest_bundle(models: Path) -> Path:
    """Bundle under `models` whose manifest (or .zip file) was written last; ties go to the last name.

    Raises:
        BundleError: there is none.
    """
    stamps = {path.parent: path.stat().st_mtime_ns for path in models.glob(f"*/{MANIFEST_FILE}")}
    stamps |= {path: path.stat().st_mtime_ns for path in models.glob("*.zip")}
    if not stamps:
        _refuse(models, "no bundle in it", f"a folder with {MANIFEST_FILE}, or a .zip", "name one with --model")
    return max(stamps, key=lambda path: (stamps[path], path.name))


def _refuse(subject: object, got: str, wanted: str, remedy: str) -> NoReturn:
    raise BundleError(str(subject), got=got, wanted=wanted, remedy=remedy)


def _manifest_of(data: bytes, location: Path) -> ModelManifest:
    try:
        return manifest_from_json(data.decode())
    except UnicodeDecodeError as error:
        _refuse(location / MANIFEST_FILE, f"bytes that are not UTF-8 ({error})", "a JSON text", _COPY_AGAIN)


def _verify(location: Path, spec: FileSpec, data: bytes) -> None:
    subject = location / spec.file
    if len(data) != spec.size_bytes:
        _refuse(subject, f"at least {len(data)} bytes", f"{spec.size_bytes} bytes", _COPY_AGAIN)
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.sha256:
        _refuse(subject, f"SHA-256 {digest}", f"{spec.sha256} as in the manifest", _COPY_AGAIN)


def _read_from_folder(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    try:
        # A link could lead out of the folder, and a bundle is copied without what it points to.
        if not stat.S_ISREG(path.lstat().st_mode):
            _refuse(path, "something that is no regular file", "a file of the bundle", _COPY_AGAIN)
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        _refuse(path, "no such file", "a complete bundle", _COPY_AGAIN)
    except OSError as error:
        _refuse(path, f"a file that cannot be read ({error.strerror})", "a readable file", "check its permissions")


@contextmanager
def _opened_zip(location: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(location) as archive:
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, NotImplementedError, RuntimeError) as error:
        _refuse(location, f"a file that is no sound .zip ({error})", "a bundle folder or .zip file", _COPY_AGAIN)


def _folder_in_zip(archive: zipfile.ZipFile, location: Path) -> str:
    """Where in the archive the manifest lies, after every name in it was checked."""
    names = [info.filename for info in archive.infolist()]
    for info in archive.infolist():
        parts = info.filename.rstrip("/").split("/")
        if info.filename.startswith("/") or "\\" in info.filename or ":" in info.filename or ".." in parts:
            _refuse(location, f"the name {info.filename!r}", "names inside the archive", "do not use this bundle")
        if stat.S_ISLNK(info.external_attr >> 16):
            _refuse(location, f"the link {info.filename!r}", "regular files only", "zip the files themselves")
    if len(names) != len(set(names)):
        _refuse(location, "one name twice", "each name once", "zip the bundle again")
    found = [name for name in names if name.split("/")[-1] == MANIFEST_FILE and name.count("/") <= 1]
    if len(found) != 1:
        wanted = f"one {MANIFEST_FILE}, at the top or in the one folder of the archive"
        _refuse(location, f"{len(found)} of them", wanted, "zip one bundle folder")
    return found[0][: -len(MANIFEST_FILE)]


def _read_from_zip(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        with archive.open(name) as file:
            # The limit bounds memory, whatever size the archive's directory claims.
            return file.read(limit + 1)
    except KeyError:
        _refuse(f"{archive.filename}: {name}", "no such entry", "a complete bundle", _COPY_AGAIN)
    except (zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        _refuse(f"{archive.filename}: {name}", f"damaged data ({error})", "an intact archive", _COPY_AGAIN)
