"""What a build shows while it runs, and how Ctrl-C stops it."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Display(Protocol):
    """Where the phases of builds are shown. Its methods may be called from any thread."""

    def say(self, text: str) -> None:
        """Shows a line on standard output."""

    def phase_started(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step_done(self, phase: str, done: int) -> None:
        """So many steps of a phase are done."""

    def phase_ended(self, phase: str) -> None:
        """A phase is over, or was stopped."""


class LineDisplay:
    """Plain lines on standard error, one for each step of an outermost phase."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def say(self, text: str) -> None:
        """Shows a line on standard output."""
        print(text, flush=True)

    def phase_started(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""
        self._steps[phase] = steps

    def step_done(self, phase: str, done: int) -> None:
        """So many steps of a phase are done."""
        print(f"{phase}: {done} of {self._steps[phase]}", file=sys.stderr, flush=True)

    def phase_ended(self, phase: str) -> None:
        """A phase is over, or was stopped."""
        self._steps.pop(phase, None)


class RichDisplay:
    """Bars of rich, which go when their phase ends.

    Args:
        progress: a started `rich.progress.Progress`.
    """

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Shows a line on standard output."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase_started(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""
        self._tasks[phase] = self._progress.add_task(phase, total=steps)

    def step_done(self, phase: str, done: int) -> None:
        """So many steps of a phase are done."""
        self._progress.update(self._tasks[phase], completed=done)

    def phase_ended(self, phase: str) -> None:
        """A phase is over, or was stopped."""
        self._progress.remove_task(self._tasks.pop(phase))


@contextmanager
def build_display(console: Any = None) -> Iterator[Display]:
    """Bars where rich is installed, plain lines where it is not.

    Args:
        console: a `rich.console.Console` to share; None makes one.
    """
    try:
        rich_progress = importlib.import_module("rich.progress")
    except ImportError:
        yield LineDisplay()
        return
    with rich_progress.Progress(console=console) as progress:
        yield RichDisplay(progress)


def build_monitor(trt: Any, label: str, display: Display | None) -> Any:
    """A TensorRT progress monitor that shows the outermost phases and has a method `stop`.

    Args:
        trt: the TensorRT module.
        label: what is built, in front of each phase.
        display: where phases are shown; None shows nothing.
    """
    return _monitor_class(trt)(label, display)


def run_stoppable(build: Callable[[], T], monitor: Any) -> T:
    """What `build` returns; Ctrl-C makes it stop at TensorRT's next step, and then goes on to the caller.

    Args:
        build: the build, which uses the monitor. It runs in a thread of its own: this one has to stay in Python, which
            notices Ctrl-C only there.
        monitor: from `build_monitor`.

    Raises:
        KeyboardInterrupt: the build was stopped.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(build())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="engine-build", daemon=True)
    try:
        thread.start()
        while not ended.wait(0.2):
            pass
    except KeyboardInterrupt:
        monitor.stop()
        if thread.ident is not None:
            ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]


@functools.cache
def _monitor_class(trt: Any) -> Any:
    class BuildMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, label: str, display: Display | None) -> None:
            super().__init__()
            self._label, self._display = label, display
            self._shown: set[str] = set()
            self._stopped = False

        def stop(self) -> None:
            self._stopped = True

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent and self._display is not None:
                self._shown.add(phase)
                self._display.phase_started(f"{self._label}: {phase}", steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._shown and self._display is not None:
                self._display.step_done(f"{self._label}: {phase}", step + 1)
            return not self._stopped

        def phase_finish(self, phase: str) -> None:
            if phase in self._shown and self._display is not None:
                self._shown.discard(phase)
                self._display.phase_ended(f"{self._label}: {phase}")

    return BuildMonitor
