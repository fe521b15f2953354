"""Where this user's files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import UsageError

_REMEDY = "set XDG_CACHE_HOME to a folder that can be written"


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/ntf-toolkit`, else `~/.cache/ntf-toolkit`; it need not be there.

    Raises:
        UsageError: neither XDG_CACHE_HOME nor a home folder is known, as in some containers.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UsageError("cache folder", got=str(error), wanted="a home folder", remedy=_REMEDY) from error
    return Path(base) / "ntf-toolkit"


def made_cache(*names: str) -> Path:
    """A folder in `user_cache`, made where it is not there.

    Raises:
        UsageError: it cannot be made.
    """
    folder = user_cache().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"a folder that cannot be made ({error.strerror})"
        raise UsageError(str(folder), got=got, wanted="a writable cache folder", remedy=_REMEDY) from error
    return folder
