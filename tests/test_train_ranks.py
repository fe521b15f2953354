"""Several processes train what one trains; one that dies, or a number that does not fit, ends the run with a sentence.

The processes are started as a user starts them, by torchrun, with gloo on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_config, write_pictures

from train.checkpoint import load_state, save_json
from train.compute import choose_device
from train.config import CacheConfig, ModelConfig, Stage1Config, Stage2Config
from train.errors import CheckpointError, ConfigError, TrainingError
from train.loading import EpochBatches, ViewPlan
from train.ranks import Ranks, check_ranks
from train.run import main, train
from train.session import refuse_other_processes

TIMEOUT_S = 120
# Largest difference from one process, relative to the largest weight of a tensor, after the whole run. A frozen encoder
# leaves the order of sums as the only difference; measured 5e-7.
SAME = 5e-6
# An encoder trained in train mode normalises the rows of each process by their own statistics; measured 3 % of the loss
# with 4 and 3 pictures, and less with more. It is another computation, not an error: --sync-batch-norm is for GPUs.
LOCAL_STATISTICS = 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 7, "val": 10})


def config_of(data, **changes):
    """Batches of 3, 3 and 1 real pictures, so that the second process has no row of the last, then 5, 5 and 4."""
    return tiny_config(
        data,
        stage1=Stage1Config(epochs=2, batch_size=3, lr=0.01, train_encoder=False),
        stage2=Stage2Config(epochs=2, batch_size=5, lr=0.2),
        model=ModelConfig("test_resnet", "none", classifier_input="both"),
        checkpoint_steps=1,
        **changes,
    )


def torchrun(folder, *arguments, processes=2):
    """Started training; its error output goes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*command, "-m", "train.run", *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def finished(process, folder):
    """Exit status and output; every process of it is gone afterwards."""
    try:
        status = process.wait(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status, (folder / "output.txt").read_text()


def train_with_processes(config, folder, processes=2):
    save_json(folder / "start.json", dataclasses.asdict(config))
    run = folder / "run"
    process = torchrun(folder, "--config", folder / "start.json", "--out", run, processes=processes)
    status, output = finished(process, folder)
    assert status == 0, output
    return run


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def difference(mine, theirs):
    """Largest difference of two runs' weights, relative to the largest weight of each tensor."""
    mine, theirs = load_file(mine / "stage2.safetensors"), load_file(theirs / "stage2.safetensors")
    assert mine.keys() == theirs.keys()
    return max(
        float((mine[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-6))
        for name, value in theirs.items()
    )


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    train(config_of(data), run)
    return run


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    return train_with_processes(config_of(data), tmp_path_factory.mktemp("two"))


def test_two_processes_train_what_one_trains_with_the_joint_batch(one, two):
    print("weights differ by", difference(two, one))
    assert difference(two, one) <= SAME
    for mine, theirs in zip(history(two), history(one), strict=True):
        for name in theirs:
            if name != "seconds":
                assert mine[name] == pytest.approx(theirs[name], rel=SAME, abs=SAME), name


def test_first_process_writes_one_history_and_one_set_of_files(one, two):
    assert {p.name for p in one.iterdir() if "tfevents" not in p.name} == {
        p.name for p in two.iterdir() if "tfevents" not in p.name
    }
    assert len(list(two.glob("events*"))) == len(list(one.glob("events*")))
    assert load_state(two)["processes"] == 2


@pytest.mark.slow
def test_batch_norm_statistics_of_two_processes_are_local_ones(data, tmp_path):
    (tmp_path / "one").mkdir()
    config = dataclasses.replace(
        config_of(data), stage1=Stage1Config(epochs=2, batch_size=7, lr=0.01, train_encoder=True)
    )
    with contextlib.suppress(Exception):  # calibration may refuse so small a model
        train(config, tmp_path / "one")
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    process = torchrun(tmp_path, "--config", tmp_path / "start.json", "--out", tmp_path / "two")
    finished(process, tmp_path)
    curves = [[r["loss"] for r in history(tmp_path / run)] for run in ("one", "two")]
    print("loss curves", curves)
    assert curves[1] == pytest.approx(curves[0], rel=LOCAL_STATISTICS)
    assert curves[1] != pytest.approx(curves[0], rel=SAME)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ntf", "probe"])
def test_two_processes_share_one_cache_and_train_what_one_trains(data, tmp_path, method):
    config = config_of(data, method=method, cache=CacheConfig(cached_views=1, cache_features=True))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, classifier_input="encoder"))
    (tmp_path / "one").mkdir()
    train(config, tmp_path / "one")
    run = train_with_processes(config, tmp_path)
    print("weights differ by", difference(run, tmp_path / "one"))
    assert difference(run, tmp_path / "one") <= SAME
    assert len(list((run / "cache").iterdir())) == {"ntf": 4, "probe": 2}[method]


@pytest.mark.slow
def test_two_processes_keep_the_neighbours_that_one_keeps(data, tmp_path):
    config = config_of(data, method="nearest")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, classifier_input="encoder"))
    (tmp_path / "one").mkdir()
    train(config, tmp_path / "one")
    assert difference(train_with_processes(config, tmp_path), tmp_path / "one") <= SAME


@pytest.mark.slow
@pytest.mark.parametrize("options", ["heads", "blocks"])
def test_two_processes_train_the_same_on_standardized_embeddings_and_last_blocks(data, tmp_path, options):
    config = config_of(data)
    balanced = dataclasses.replace(config.stage2, class_balance=True, warmup_epochs=1)
    if options == "heads":
        model = dataclasses.replace(config.model, standardize=True)
        config = dataclasses.replace(config, model=model, stage2=balanced)
    else:
        config = dataclasses.replace(config, stage2=dataclasses.replace(balanced, train_encoder_blocks=1))
    (tmp_path / "one").mkdir()
    train(config, tmp_path / "one")
    run = train_with_processes(config, tmp_path)
    print("weights differ by", difference(run, tmp_path / "one"))
    assert difference(run, tmp_path / "one") <= SAME


def test_parts_of_a_batch_are_the_batch_in_its_order():
    plan = ViewPlan(0, 1, (8, 8), (8, 8), config_of("x").augment)
    whole = list(EpochBatches(7, 3, plan, 0))
    parts = [list(EpochBatches(7, 3, plan, 0, ranks=Ranks(rank, 2, rank, 2))) for rank in range(2)]
    assert [len(batch) for batch in parts[0]] == [2, 2, 1]
    # The last one of the second process is there to have a forward pass at all; its rows are left out.
    assert [len(batch) for batch in parts[1]] == [1, 1, 1]
    assert Ranks(1, 2).part(1) == slice(1, 1)
    for step in (0, 1):
        assert parts[0][step] + parts[1][step] == whole[step]


def wait_for_first_checkpoint(run, process):
    deadline = time.monotonic() + TIMEOUT_S
    while not (run / "state.pt").is_file():
        assert process.poll() is None, "training ended early"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def workers_of(process):
    """Ids of the training processes that torchrun started, in the order of their ranks."""
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    return [int(line.split()[0]) for line in children.splitlines() if "train.run" in line]


def test_process_that_dies_ends_the_run_and_a_resume_gives_the_same_weights(data, two, tmp_path):
    config = config_of(data)
    save_json(tmp_path / "start.json", dataclasses.asdict(config))
    run = tmp_path / "run"
    process = torchrun(tmp_path, "--config", tmp_path / "start.json", "--out", run)
    wait_for_first_checkpoint(run, process)
    began = time.monotonic()
    os.kill(workers_of(process)[1], signal.SIGKILL)
    status, output = finished(process, tmp_path)
    assert status != 0
    assert time.monotonic() - began < 60
    assert re.search(r"error: process 0 of 2: got no answer from another process .*go on with --resume", output), output
    load_state(run)
    with pytest.raises(CheckpointError, match="got 1 processes, wanted 2, with which the run began"):
        train(config, run, resume=True)
    status, output = finished(torchrun(tmp_path, "--resume", run), tmp_path)
    assert status == 0, output
    mine, theirs = load_file(run / "stage2.safetensors"), load_file(two / "stage2.safetensors")
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def test_error_of_the_first_process_ends_the_others(data, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    process = torchrun(tmp_path, "--data", data, "--out", tmp_path / "taken", "--device", "cpu")
    status, output = finished(process, tmp_path)
    assert status != 0
    assert "wanted a new folder, or an earlier run and --overwrite" in output


def test_more_processes_than_pictures_in_a_batch_are_refused():
    with pytest.raises(ConfigError, match=r"8 processes: got 4 pictures in a batch of --stage1.batch-size, wanted at "):
        check_ranks(Ranks(0, 8), batch_sizes={"--stage1.batch-size": 4})


def test_command_line_refuses_them_before_a_folder_is_made(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("RANK", "0")
    assert main(["--data", str(data), "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "error: 100 processes: got 24 pictures in a batch of --stage1.batch-size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="got 2 processes and 1 GPUs on this machine"):
        choose_device("cuda", Ranks(0, 2, 0, 2))


def test_resume_with_another_number_of_processes_says_how_to_start_it(tmp_path):
    refuse_other_processes({}, Ranks(), tmp_path)
    with pytest.raises(CheckpointError, match=r"torchrun --nproc-per-node 4 -m train.run --resume"):
        refuse_other_processes({"processes": 4}, Ranks(), tmp_path)


def test_failure_of_the_first_process_is_an_error_of_the_others(monkeypatch):
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda told: None)
    with pytest.raises(TrainingError, match="process 1 of 2: got an error in process 0"):
        Ranks(1, 2).from_first(lambda: None)
