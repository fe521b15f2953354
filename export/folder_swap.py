"""A folder that is replaced as a whole: whenever someone looks, it is the old or the new one."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import ExportError

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed program left stays
    fcntl = None  # type: ignore[assignment]

# Of renameat2(2): relative to the working directory, and exchange both names in one step.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends without an error.

    Args:
        folder: where the new content will stand, readable for everyone; its parents are made.

    Raises:
        ExportError: something cannot be written, in the block as well; what stood there stands as it was.

    Note:
        On Linux both folders change their names in one step. Elsewhere there are two, and a program that is killed
        between them leaves the old folder under another name, which `restore_folder` gives back. What a killed program
        left beside the folder is removed here.
    """
    folder = folder.resolve()  # of a link, the folder that it leads to is replaced
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(folder)
        _remove_abandoned(folder)
        with _new_folder(folder) as new:
            yield new
            new.chmod(0o755)  # mkdtemp's 0700 would lock other users out of a shared folder
            _sync(new)
            if not folder.exists():
                new.rename(folder)
            elif not _exchange(new, folder):
                _rename_twice(new, folder)
            _sync(folder.parent)
    except OSError as error:
        raise ExportError(
            str(folder),
            got=f"{error.strerror or error} while it was written",
            wanted="a folder beside it that can be written and has room for it",
            remedy="free space or change the permissions, and run the command again; what was there stands as it was",
        ) from error


def restore_folder(folder: Path) -> None:
    """Give back the old folder where a program was killed between two renamings; remove it where the new one stands."""
    folder = folder.resolve()
    old = _old_name(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def _exchange(new: Path, folder: Path) -> bool:
    """Whether both names were exchanged in one step; False where the system or its file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(folder))


def _rename_twice(new: Path, folder: Path) -> None:
    old = _old_name(folder)
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _new_prefix(folder: Path) -> str:
    return f".{folder.name}.new-"


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked while the block runs; what is under its name then is removed."""
    new, handle = _made_and_held(folder)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _made_and_held(folder: Path) -> tuple[Path, int | None]:
    """A new folder beside `folder` and the handle with its lock, which ends with the program."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_new_prefix(folder), dir=folder.parent))
        with suppress(FileNotFoundError, BlockingIOError):  # another program has just taken it for abandoned
            handle = _hold(made)
            if made.exists():
                return made, handle
            if handle is not None:
                os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove what programs left that were killed while they wrote: their locks went with them."""
    for path in folder.parent.glob(f"{glob.escape(_new_prefix(folder))}*"):
        with suppress(FileNotFoundError, BlockingIOError):  # removed by another program, or held by one that lives
            handle = _hold(path)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _hold(folder: Path) -> int | None:
    """Handle of a folder with its lock, or None where there are no locks on folders.

    Raises:
        BlockingIOError: another program holds it.
        FileNotFoundError: it is gone.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where a folder can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
