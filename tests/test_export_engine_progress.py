"""What a build shows, and that Ctrl-C stops it."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading

import pytest
from rich.console import Console
from tensorrt_fakes import fake_tensorrt

from export.engine_progress import LineDisplay, RichDisplay, build_display, build_monitor, run_stoppable


@pytest.fixture(scope="module")
def trt():
    return fake_tensorrt(10)


def phases(monitor):
    """A build of two nested phases; whether each step of the outer one was allowed."""
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Choosing", "Building", 9)
    monitor.step_complete("Choosing", 0)
    monitor.phase_finish("Choosing")
    allowed = [monitor.step_complete("Building", step) for step in range(2)]
    monitor.phase_finish("Building")
    return allowed


def test_without_rich_the_steps_of_the_outermost_phase_are_lines_on_standard_error(trt, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with build_display() as display:
        assert isinstance(display, LineDisplay)
        assert phases(build_monitor(trt, "fp16 engine", display)) == [True, True]
        display.say("done")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["fp16 engine: Building: 1 of 2", "fp16 engine: Building: 2 of 2"]
    assert printed.out == "done\n"


def test_with_rich_a_phase_is_a_bar_that_goes_when_it_ends(trt):
    out = io.StringIO()
    with build_display(Console(file=out, force_terminal=True, width=80)) as display:
        assert isinstance(display, RichDisplay)
        monitor = build_monitor(trt, "fp16 engine", display)
        monitor.phase_start("Building", None, 4)
        monitor.step_complete("Building", 2)
        (task,) = display._progress.tasks
        assert (task.description, task.completed, task.total) == ("fp16 engine: Building", 3, 4)
        monitor.phase_finish("Building")
        assert not display._progress.tasks
        display.say("for [rtx]")
    assert "for [rtx]" in out.getvalue()


def test_a_monitor_without_a_display_shows_nothing_and_stops_when_it_is_told(trt):
    monitor = build_monitor(trt, "fp16 engine", None)
    assert phases(monitor) == [True, True]
    monitor.stop()
    assert phases(monitor) == [False, False]


def test_a_build_runs_in_a_thread_and_its_result_and_its_error_come_back(trt):
    monitor = build_monitor(trt, "engine", None)
    assert run_stoppable(lambda: threading.current_thread().name, monitor) == "engine-build"
    with pytest.raises(ZeroDivisionError):
        run_stoppable(lambda: 1 // 0, monitor)


@pytest.fixture
def python_handles_ctrl_c():
    """As in a program; a test run in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_stops_the_build_at_its_next_step_and_goes_on_to_the_caller(trt):
    monitor = build_monitor(trt, "engine", None)
    ended = []

    def build():
        os.kill(os.getpid(), signal.SIGINT)
        allowed = True
        for _ in range(1000):
            allowed = allowed and monitor.step_complete("Building", 0)
            threading.Event().wait(0.002 if allowed else 0)
        ended.append(not allowed)

    with pytest.raises(KeyboardInterrupt):
        run_stoppable(build, monitor)
    assert ended == [True]
