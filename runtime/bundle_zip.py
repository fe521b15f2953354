"""The one-file form of a model bundle: what is refused in a .zip before its content is used, and how one is written.

A .zip that a person made is accepted. One that `pack_bundle` wrote carries a seal, the SHA-256 of everything before it,
as its comment, so that a changed byte is found in headers as well, where no file of the bundle is.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from runtime.errors import BundleError
from runtime.manifest import MANIFEST_FILE
from runtime.replacing import replacing

COPY_AGAIN = "copy the bundle again, or export the model again"

# An ONNX graph holds 2 GiB at most, and engines are about as large as the graph.
_MAX_ENTRY_BYTES = 4 << 30
# Weights shrink by a tenth, and text to a tenth; what a manifest claims could else be made of next to nothing.
_MAX_INFLATION = 200
_SEAL = b"ntf-toolkit bundle, sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_END_RECORD, _END_RECORD_BYTES = b"PK\x05\x06", 22
# The earliest date that a .zip can state.
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


@contextmanager
def opened_zip(location: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open for reading.

    Raises:
        BundleError: it is no sound .zip file.
    """
    try:
        with zipfile.ZipFile(location) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        _refuse(location, f"a file that is no sound .zip ({error})", "a bundle folder or .zip file", COPY_AGAIN)


def folder_in_zip(archive: zipfile.ZipFile, location: Path) -> str:
    """Where in the archive the manifest lies ("" or ending in "/"), after every entry and the seal were checked.

    Raises:
        BundleError: a name leaves the archive or is there twice, an entry is no plain file, claims to be larger than
            any bundle's file or is packed in an unusual way, the seal is broken, or there is not one manifest.
    """
    _check_seal(archive, location)
    for info in archive.infolist():
        _check_entry(info, location)
    names = archive.namelist()
    if len(names) != len(set(names)):
        _refuse(location, "one name twice", "each name once", "zip the bundle again")
    found = [name for name in names if name.split("/")[-1] == MANIFEST_FILE and name.count("/") <= 1]
    if len(found) != 1:
        wanted = f"one {MANIFEST_FILE}, at the top or in the one folder of the archive"
        _refuse(location, f"{len(found)} of them", wanted, "zip one bundle folder")
    return found[0][: -len(MANIFEST_FILE)]


def read_from_zip(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Content of one entry, which is not read beyond `limit` bytes whatever it claims or inflates to.

    Raises:
        BundleError: there is no such entry, it claims more than `limit` bytes or inflates beyond reason, or its data
            are damaged.
    """
    subject = f"{archive.filename}: {name}"
    try:
        info = archive.getinfo(name)
        if info.file_size > limit:
            _refuse(subject, f"an entry of {info.file_size} bytes", f"at most {limit} bytes", COPY_AGAIN)
        if info.file_size > _MAX_INFLATION * info.compress_size:
            got = f"{info.compress_size} bytes that inflate to {info.file_size}"
            _refuse(subject, got, f"at most {_MAX_INFLATION} times as much", "do not use this bundle, or zip it again")
        with archive.open(name) as file:
            return file.read(limit + 1)
    except KeyError:
        _refuse(subject, "no such entry", "a complete bundle", COPY_AGAIN)
    except (zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        _refuse(subject, f"damaged data ({error})", "an intact archive", COPY_AGAIN)


def write_zip(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes a sealed .zip: complete or not at all, and the same bytes for the same files.

    Args:
        target: where it will stand; a file there is replaced.
        files: name and content, in the order in which they are written.

    Note:
        Nothing is compressed: weights hardly shrink, and what zlib makes of them depends on its version.
    """
    with replacing(target) as file:
        _write_archive(file, files)


def _write_archive(file: BinaryIO, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name, _NO_DATE)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.create_system = _UNIX
            archive.writestr(info, content)
        archive.comment = bytes(_SEAL_BYTES)
    end = file.seek(-_SEAL_BYTES, os.SEEK_END)
    seal = _seal_of(file, end)
    file.seek(end)
    file.write(seal)


def _check_seal(archive: zipfile.ZipFile, location: Path) -> None:
    comment = archive.comment
    with location.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - len(comment)
        file.seek(max(0, end - _END_RECORD_BYTES))
        if file.read(len(_END_RECORD)) != _END_RECORD:
            _refuse(location, "bytes behind the end of the archive", "a .zip and nothing else", COPY_AGAIN)
        if comment and comment != _seal_of(file, end):
            _refuse(location, "a comment that is no seal, or a seal of other bytes", "an intact archive", COPY_AGAIN)


def _seal_of(file: BinaryIO, end: int) -> bytes:
    """The seal of the first `end` bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while end > 0 and (block := file.read(min(end, 1 << 20))):
        digest.update(block)
        end -= len(block)
    return _SEAL + digest.hexdigest().encode()


def _check_entry(info: zipfile.ZipInfo, location: Path) -> None:
    name = info.filename
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.rstrip("/").split("/"):
        _refuse(location, f"the name {name!r}", "names inside the archive", "do not use this bundle")
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        _refuse(location, f"the link {name!r}", "regular files only", "zip the files themselves")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        _refuse(location, f"{name!r}, which is no regular file", "regular files only", "do not use this bundle")
    if info.file_size > _MAX_ENTRY_BYTES:
        got = f"{name!r}, which claims {info.file_size} bytes"
        _refuse(location, got, f"at most {_MAX_ENTRY_BYTES} bytes", "do not use this bundle")
    # The other methods may ask for gigabytes of memory before the first byte comes out.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        got = f"{name!r}, compressed by method {info.compress_type}"
        _refuse(location, got, "entries that are stored or deflated", "zip the bundle again")


def _refuse(subject: object, got: str, wanted: str, remedy: str) -> NoReturn:
    raise BundleError(str(subject), got=got, wanted=wanted, remedy=remedy)
