"""TensorRT's messages: the one logger of the process, and who listens to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

# Is given the severity's name and the text.
Listener: TypeAlias = "Callable[[str, str], None]"

_LISTENERS: list[Listener] = []


@contextmanager
def listening(trt: Any, listener: Listener) -> Iterator[Any]:
    """The logger to hand to TensorRT, whose messages a listener is given while this is open.

    Args:
        trt: the TensorRT module.
        listener: called in whatever thread TensorRT works.
    """
    _LISTENERS.append(listener)
    try:
        yield the_logger(trt)
    finally:
        _LISTENERS.remove(listener)


@functools.cache
def the_logger(trt: Any) -> Any:
    """The one logger of a TensorRT module: it keeps the first it is given, and a second one has crashed it."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            for listener in tuple(_LISTENERS):
                listener(severity.name, message)

    return Recorder()
