"""pyarrow's Parquet module, imported when a table is read or written."""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import UsageError


def import_parquet(subject: str) -> Any:
    """The module `pyarrow.parquet`.

    Args:
        subject: the file that needs it, for the message.

    Raises:
        UsageError: the package is not installed, or does not import.
    """
    try:
        return importlib.import_module("pyarrow.parquet")
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("pyarrow")
        raise UsageError(
            subject,
            got="no package pyarrow" if missing else f"a pyarrow that does not import ({error})",
            wanted="an installation that reads and writes Parquet",
            remedy='pip install "ntf-toolkit[score]", or use CSV',
        ) from error
