"""Errors of exporting; all derive from `runtime.errors.NTFError`."""

from __future__ import annotations

from runtime.errors import NTFError


class ExportError(NTFError):
    """A model cannot be exported, quantised, built or verified as asked."""
