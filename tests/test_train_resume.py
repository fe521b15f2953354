"""A run that is killed, or whose disk is full, goes on to the weights of an undisturbed run, or is refused.

This file, run as a program, starts training in a child, kills it with SIGKILL at random moments and resumes it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_config, write_pictures

from train import checkpoint
from train.checkpoint import load_state, save_json, save_state, write_atomically
from train.config import Stage1Config, Stage2Config
from train.errors import CheckpointError
from train.loop import StageLoop
from train.run import main, train

TIMEOUT_S = 300
# A child trains for up to so long before it is killed, by number of kills; an undisturbed run takes about 3 s.
LONGEST_S = {2: 1.5, 10: 0.7}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})
    return tiny_config(
        data,
        stage1=Stage1Config(epochs=6, batch_size=2, lr=0.01),
        stage2=Stage2Config(epochs=6, batch_size=3, lr=0.5),
        checkpoint_steps=1,
    )


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    train(config, run)
    return run


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(mine, theirs):
    weights, expected = load_file(mine / "stage2.safetensors"), load_file(theirs / "stage2.safetensors")
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert history(mine) == history(theirs)
    assert (mine / "calibration.json").read_bytes() == (theirs / "calibration.json").read_bytes()
    assert not list(mine.glob(".*.tmp"))


# What the program does.


def train_in_child(arguments):
    """Id of a child that trains; it is forked, so that nothing has to be imported again."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os._exit(main(arguments))
    return child


def kill_at_random(start, run, kills, seed):
    moments = random.Random(seed)
    stops = []
    while len(stops) < kills:
        begun = (run / "config.json").is_file()
        child = train_in_child(["--resume", str(run)] if begun else ["--config", str(start), "--out", str(run)])
        while not (run / "config.json").is_file():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, LONGEST_S[kills]))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it had ended: begin another one
            shutil.rmtree(run)
            continue
        state = load_state(run) if (run / "state.pt").is_file() else {"stage": 0, "epoch": 0, "step": 0}
        stops.append([state["stage"], state["epoch"], state["step"]])
    print(json.dumps(stops))
    _, status = os.waitpid(train_in_child(["--resume", str(run)]), 0)
    return os.waitstatus_to_exitcode(status)


# The tests.


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(config, undisturbed, tmp_path, kills):
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    seed = random.SystemRandom().randrange(1 << 30)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "start.json"), str(tmp_path / "run"), str(kills), str(seed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(f"seed {seed}: stopped at [stage, epoch, batch]", done.stdout)
    assert len(json.loads(done.stdout)) == kills
    assert_same_run(tmp_path / "run", undisturbed)


def test_run_killed_before_its_first_checkpoint_begins_again(config, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "train", lambda loop: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    assert not (tmp_path / "state.pt").exists()
    (tmp_path / ".state.pt.1.tmp").write_bytes(b"half")
    assert main(["--resume", str(tmp_path)]) == 0
    assert_same_run(tmp_path, undisturbed)


def test_folder_with_nothing_but_a_half_written_file_may_be_used(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.1.tmp").write_bytes(b"{")
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    monkeypatch.setattr("train.run.train", lambda *_, **__: None)
    assert main(["--config", str(tmp_path / "start.json"), "--out", str(tmp_path / "run")]) == 0


def full_disk(path):
    """`os.fsync` as a full disk has it, for writes of one file: the content is cut short."""
    plain = os.fsync

    def fsync(descriptor):
        if f".{path}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.ftruncate(descriptor, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    return fsync


@pytest.mark.parametrize("step", [0, 5, 40])
def test_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    config, undisturbed, tmp_path, monkeypatch, capsys, step
):
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    run, saved = tmp_path / "run", []
    plain = checkpoint.save_state

    def filling(path, state):
        saved.append(path)
        with monkeypatch.context() as patch:
            if len(saved) > step:
                patch.setattr(os, "fsync", full_disk("state.pt"))
            plain(path, state)

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.save_state", filling)
        assert main(["--config", str(tmp_path / "start.json"), "--out", str(run)]) == 2
    told = capsys.readouterr().err
    assert "state.pt: got No space left on device, wanted room for" in told
    assert "goes on with --resume" in told
    assert not list(run.glob(".*.tmp"))
    assert (run / "state.pt").exists() == (step > 0)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(run, undisturbed)


def test_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path):
    save_state(tmp_path / "state.pt", {"epoch": 1})
    before = (tmp_path / "state.pt").read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"state\.pt: got File too large, wanted room for [\d,]+ bytes"):
            save_state(tmp_path / "state.pt", {"rows": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_history_that_cannot_be_written_is_an_error_with_a_sentence(tmp_path):
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"history\.jsonl: got Is a directory"):
        checkpoint.append_history(tmp_path, {"stage": 1})


def test_error_of_another_kind_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        write_atomically(tmp_path / "file", b"content")


def test_resume_with_a_configuration_that_was_edited_is_refused(config, undisturbed, tmp_path, capsys):
    for name in ("config.json", "state.pt"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    edited = json.loads((tmp_path / "config.json").read_text())
    edited["config"]["stage2"]["lr"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(edited))
    assert main(["--resume", str(tmp_path)]) == 2
    expected = "got stage2.lr = 0.25, wanted what the run began with, stage2.lr = 0.5: restore its config.json"
    assert expected in capsys.readouterr().err


def test_resume_of_a_run_without_a_checkpoint_checks_its_pictures(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "train", lambda loop: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    picture = sorted((Path(config.data) / "train").rglob("*.png"))[0]
    original = picture.read_bytes()
    try:
        picture.write_bytes(original + b"\0")
        with pytest.raises(CheckpointError, match="got pictures with train_sha256"):
            train(config, tmp_path, resume=True)
    finally:
        picture.write_bytes(original)


if __name__ == "__main__":
    sys.exit(kill_at_random(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
