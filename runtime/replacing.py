"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, open for reading as well, that takes the place of `path` at the end of the context.

    After an exception, or where the process ends before, what stood at `path` stands there still. The content is on the
    disk when the new name is.

    Args:
        path: the file to make or replace; its folder must exist.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    import tempfile  # a tenth of the time that importing the runtime takes, and only what writes needs it

    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would lock other users out of a shared bundle
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
