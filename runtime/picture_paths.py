"""Pictures named on a command line: files as they are, folders searched, patterns expanded by us."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from runtime.decode import PICTURE_SUFFIXES
from runtime.errors import UsageError


def expand_pictures(arguments: Iterable[str]) -> list[str]:
    """Paths of the pictures meant by command line arguments, in order, each once.

    Args:
        arguments: a folder stands for all pictures below it by their suffix, sorted, hidden ones left out; a name
            with *, ? or [ that is no file stands for what it matches (** for any depth); any other name stands for
            itself, whatever its suffix and whether it exists or not.

    Raises:
        UsageError: a folder holds no pictures, or a pattern matches nothing.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        found.update(dict.fromkeys(_expand(argument)))
    return list(found)


def files_below(folder: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Paths of the files below a folder whose name is wanted, sorted within each folder; hidden ones are left out.

    Args:
        folder: where to look; links to folders are not followed.
        wanted: says for a file's name whether it is meant.

    Raises:
        UsageError: a folder cannot be read.

    Note:
        Holds the names of one folder, and of those above it, at a time.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and wanted(name):
                yield os.path.join(parent, name)


def _expand(argument: str) -> list[str]:
    if os.path.isdir(argument):
        return _pictures_below(argument) or _refuse(argument, "a folder without pictures")
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    pictures: list[str] = []
    for match in sorted(glob.glob(argument, recursive=True)):
        pictures += _pictures_below(match) if os.path.isdir(match) else [match]
    return pictures or _refuse(argument, "a pattern that matches no picture")


def _pictures_below(folder: str) -> list[str]:
    return list(files_below(folder, is_picture_name))


def is_picture_name(name: str) -> bool:
    """Whether a scan of a folder takes a file of this name for a picture."""
    return not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES


def _refuse_folder(error: OSError) -> NoReturn:
    raise UsageError(
        str(error.filename),
        got=f"a folder that cannot be read ({error.strerror})",
        wanted="readable folders",
        remedy="check its permissions",
    ) from error


def _refuse(argument: str, got: str) -> NoReturn:
    raise UsageError(
        argument,
        got=got,
        wanted=f"files ending in {', '.join(PICTURE_SUFFIXES)}",
        remedy="check the path; a file that is named outright is tried whatever its suffix",
    )
