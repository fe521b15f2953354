"""Where this user's files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/ntf-toolkit`, else `~/.cache/ntf-toolkit`; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ntf-toolkit"
