"""Run by test_export_bundling: writes a bundle over another, killed at each line of the code that writes.

    killed_writer.py OLD NEW TARGET exchange|twice

Each time a child writes NEW over OLD, which stands in TARGET, and kills itself when it comes to one more line than the
child before, until one comes to the end. One line of JSON each: whether it was killed, the name of the bundle that
stands there, and of the one that the next export finds. "twice" forbids to exchange names in one step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import export.folder_swap
import runtime.manifest
from export import bundling
from runtime.bundle import open_bundle
from runtime.errors import BundleError

WATCHED = {bundling.write_bundle.__code__, bundling.write_file.__code__, runtime.manifest.save_manifest.__code__}


def main(old, new, target, way):
    os.fsync = lambda handle: None  # a kill takes nothing from the kernel; power failures are not tested here
    if way == "twice":
        export.folder_swap._exchange = lambda new, folder: False
    bundling.open_bundle = untraced(bundling.open_bundle)
    runtime.manifest.manifest_to_json = untraced(runtime.manifest.manifest_to_json)
    new = loaded(new)
    lines, killed = 0, True
    while killed:
        child = os.fork()
        if child == 0:
            sys.settrace(killer(lines))
            bundling.write_bundle(target, *new)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        print(json.dumps([killed, standing(target), found(target)]))
        with export.folder_swap.replaced_folder(target) as again:
            shutil.copytree(old, again, dirs_exist_ok=True)
        assert os.listdir(target.parent) == [target.name], os.listdir(target.parent)
        lines += 1


def killer(lines):
    """A trace function that kills the process when it comes to the line after these many of the watched code."""

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code not in WATCHED and frame.f_code.co_filename != export.folder_swap.__file__:
            return None
        if event == "line":
            lines -= 1
        if lines < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def untraced(function):
    """The function, none of whose lines writes, at its full speed."""

    def called(*arguments):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*arguments)
        finally:
            sys.settrace(trace)

    return called


def loaded(folder):
    bundle = open_bundle(folder)
    return bundle.manifest, {spec.file: bundle.read(spec) for spec in bundle.manifest.files()}


def standing(target):
    try:
        return open_bundle(target).manifest.name
    except BundleError as error:
        return f"no bundle ({error.got})"


def found(target):
    bundle = bundling.existing_bundle(target, "0" * 64)
    return bundle and bundle.manifest.name


if __name__ == "__main__":
    main(*(Path(path) for path in sys.argv[1:4]), sys.argv[4])
