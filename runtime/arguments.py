"""Checks of the numbers that a caller passes."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np

from runtime.errors import UsageError

_REMEDY = "leave it out for the default"


def require_positive(name: str, value: object) -> None:
    """Nothing for a whole number of at least 1.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UsageError(name, got=repr(value), wanted="a whole number of at least 1", remedy=_REMEDY)


def require_duration(name: str, value: object, *, zero: bool = False) -> None:
    """Nothing for a finite number above 0, or from 0 where `zero` is set.

    Raises:
        UsageError: anything else.
    """
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
        wanted = f"a finite number {'of at least' if zero else 'above'} 0"
        raise UsageError(name, got=repr(value), wanted=wanted, remedy=_REMEDY)
