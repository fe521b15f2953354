"""A disk that is really full, a small tmpfs, stops training with a sentence; with more room a resume goes on exactly.

This file, run as a program in a name space of its own (`unshare`), mounts the file system and trains on it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_config, write_pictures

from train.checkpoint import load_state, save_json
from train.run import main, train

TIMEOUT_S = 300
# Room for one checkpoint of stage 1, and not for the next one beside it.
SMALL, LARGE = "5m", "64m"
OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})
    return tiny_config(data, checkpoint_steps=1)


# What the program does.


def status_in_child(arguments, told):
    """Exit status of a training in a child, whose messages go to a file."""
    child = os.fork()
    if child == 0:
        sink = os.open(told, os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def fill_and_resume(start, disk, results):
    run = disk / "run"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(disk)], check=True)
    first = status_in_child(["--config", str(start), "--out", str(run)], results / "first.txt")
    state = load_state(run)
    found = {
        "first": first,
        "position": [state["stage"], state["epoch"], state["step"]],
        "half_written": [path.name for path in run.glob(".*.tmp")],
    }
    subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(disk)], check=True)
    found["second"] = status_in_child(["--resume", str(run)], results / "second.txt")
    shutil.copytree(run, results / "run")
    print(json.dumps(found))
    return 0


# The test.


@pytest.mark.slow
def test_full_file_system_keeps_the_last_checkpoint_and_more_room_lets_the_run_go_on(config, tmp_path):
    for name in ("disk", "results", "undisturbed"):
        (tmp_path / name).mkdir()
    mountable = subprocess.run(
        [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False
    )
    if mountable.returncode:
        pytest.skip(f"no file system can be mounted here: {mountable.stderr.decode().strip()}")
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    arguments = [str(tmp_path / name) for name in ("start.json", "disk", "results")]
    done = subprocess.run(
        [*OWN_MOUNTS, sys.executable, __file__, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    told = (tmp_path / "results" / "first.txt").read_text()
    assert found == {"first": 2, "position": [1, 0, 1], "half_written": [], "second": 0}, told
    assert "state.pt: got No space left on device, wanted room for" in told
    assert "Traceback" not in told
    train(config, tmp_path / "undisturbed")
    mine, theirs = tmp_path / "results" / "run", tmp_path / "undisturbed"
    expected = load_file(theirs / "stage2.safetensors")
    for name, value in load_file(mine / "stage2.safetensors").items():
        assert torch.equal(value, expected[name]), name
    assert (mine / "calibration.json").read_bytes() == (theirs / "calibration.json").read_bytes()


if __name__ == "__main__":
    sys.exit(fill_and_resume(*map(Path, sys.argv[1:])))
