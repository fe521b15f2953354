"""TensorRT's messages during a build: kept, and turned into the reason of a refusal."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

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
    logger, messages = _logger(trt), []  # type: Any, Messages
    logger.messages = messages
    try:
        yield logger, messages
    finally:
        logger.messages = None


def errors_of(messages: Sequence[tuple[str, str]]) -> str:
    """The errors among the messages, in one line; empty when there are none."""
    texts = [without_driver_errors(text) for severity, text in messages if severity.endswith("ERROR")]
    return "; ".join(dict.fromkeys(text for text in texts if text))


def without_driver_errors(text: str) -> str:
    """A message without what it says about a missing driver, in one line."""
    return "; ".join(line.strip() for line in _NO_DRIVER.sub("", text).splitlines() if line.strip())


@functools.cache
def _logger(trt: Any) -> Any:
    """The one logger of this process: TensorRT keeps the first it is given, and a second one has crashed it."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: Messages | None = None

        def log(self, severity: Any, message: str) -> None:
            if self.messages is not None and (severity.name in _KEPT or message.startswith(PLAN_START)):
                self.messages.append((severity.name, message))

    return Recorder()
