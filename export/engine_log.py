"""TensorRT's messages during a build: kept, and turned into the reason of a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from runtime.backends.trt_log import listening

# Severity and text.
Messages: TypeAlias = "list[tuple[str, str]]"

PLAN_START = "Layers:"
_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")
# "cudaError 35" says that there is no driver, which a build for named targets does not need.
_NO_DRIVER = re.compile(r"[^;\n]*\(?cudaError\w* 35[^)\n]*\)*\.?|CUDA initialization failure with error: 35[^.]*\.?")


@contextmanager
def recorded_messages(trt: Any) -> Iterator[tuple[Any, Messages]]:
    """The logger to hand to TensorRT, and the list that its errors, warnings and layer plans are written to.

    Args:
        trt: the TensorRT module.
    """
    messages: Messages = []

    def keep(severity: str, text: str) -> None:
        if severity in _KEPT or text.startswith(PLAN_START):
            messages.append((severity, text))

    with listening(trt, keep) as logger:
        yield logger, messages


def errors_of(messages: Sequence[tuple[str, str]]) -> str:
    """The errors among the messages, in one line; empty when there are none."""
    texts = [without_driver_errors(text) for severity, text in messages if severity.endswith("ERROR")]
    return "; ".join(dict.fromkeys(text for text in texts if text))


def without_driver_errors(text: str) -> str:
    """A message without what it says about a missing driver, in one line."""
    return "; ".join(line.strip() for line in _NO_DRIVER.sub("", text).splitlines() if line.strip())
