"""Number format, memory layout and compilation change how training computes, not what; each resumes exactly."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

from train.checkpoint import load_state
from train.compute import check_compute
from train.config import ComputeConfig, ModelConfig, Stage1Config, Stage2Config
from train.errors import ConfigError, TrainingError
from train.loading import EpochBatches, ViewPlan
from train.loop import StageLoop
from train.ranks import Ranks
from train.run import main, train

CPU = torch.device("cpu")
# Largest relative difference of the loss curve from plain float32; measured: channels_last 0, compile 1e-6, bf16 2e-3.
TOLERANCE = {"channels_last": 1e-4, "compile": 1e-4, "precision": 0.05}
OPTIONS = [
    ComputeConfig(precision="bf16"),
    ComputeConfig(channels_last=True),
    pytest.param(ComputeConfig(compile=True), marks=pytest.mark.slow),
]


def name_of(option):
    changed = [f.name for f in dataclasses.fields(option) if getattr(option, f.name) != f.default]
    return "_".join(changed)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})
    return tiny_config(
        data,
        model=ModelConfig("test_resnet", "none", classifier_input="both"),
        stage1=Stage1Config(epochs=1, batch_size=3, lr=0.01),
        stage2=Stage2Config(epochs=2, batch_size=5, lr=0.2),
        checkpoint_steps=1,
    )


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain")
    train(config, run)
    return run


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("compute", OPTIONS, ids=name_of)
def test_option_trains_the_same_model_and_resumes_exactly(config, plain, tmp_path, compute):
    changed = dataclasses.replace(config, compute=compute)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run in (whole, stopped):
        run.mkdir()
    train(changed, whole)
    curves = [[r["loss"] for r in history(run)] for run in (whole, plain)]
    assert curves[0] == pytest.approx(curves[1], rel=TOLERANCE[name_of(compute)])
    assert all(
        value.dtype in (torch.float32, torch.int64) for value in load_file(whole / "stage2.safetensors").values()
    )
    theirs = load_file(whole / "stage2.safetensors")
    assert {value.dtype for value in theirs.values()} <= {torch.float32, torch.int64}
    with stopping_after(4), pytest.raises(KeyboardInterrupt):
        train(changed, stopped)
    assert load_state(stopped)["stage"] == 2
    assert main(["--resume", str(stopped)]) == 0
    for name, value in load_file(stopped / "stage2.safetensors").items():
        assert torch.equal(value, theirs[name]), name
    assert (stopped / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_bfloat16_is_what_convolutions_compute_in(config, plain, tmp_path):
    train(dataclasses.replace(config, compute=ComputeConfig(precision="bf16")), tmp_path)
    assert history(tmp_path)[0]["loss"] != pytest.approx(history(plain)[0]["loss"], rel=1e-5)


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"--compile: got no-such-compiler, which is not on the path, wanted a C\+\+"):
        check_compute(ComputeConfig(compile=True), CPU, Ranks())


def test_common_batch_norm_is_refused_on_a_cpu_before_a_folder_is_made(config, tmp_path, capsys):
    arguments = ["--data", config.data, "--device", "cpu", "--sync-batch-norm", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "--sync-batch-norm: got 1 process on cpu, wanted several processes on GPUs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_batches_that_a_loss_cannot_use_are_counted_and_said(config, tmp_path, capsys):
    small = dataclasses.replace(
        config, stage1=Stage1Config(epochs=1, batch_size=5), stage2=Stage2Config(epochs=1, batch_size=2, lr=0.2)
    )
    train(small, tmp_path)
    first, second = history(tmp_path)
    # 6 real pictures in batches of 5: the last one is alone. The others come in the order of the keys.
    assert first["one_picture_batches"] == 1
    plan = ViewPlan(small.seed, 2, (160, 160), (32, 32), small.augment)
    labels = np.array([0] * 6 + [1] * 6)
    batches = [labels[[key.index for key in batch]] for batch in EpochBatches(12, 2, plan, 0)]
    assert second["one_class_batches"] == sum(len(set(batch)) == 1 for batch in batches) > 0
    assert second["no_real_batches"] == sum(batch.min() == 1 for batch in batches) > 0
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 of 2 batches had one picture alone" in told
    assert f"warning: {second['no_real_batches']} of 6 batches had no real picture, so no natural traces and" in told


def test_whole_batches_are_not_reported(plain):
    assert [r["one_picture_batches"] for r in history(plain) if r["stage"] == 1] == [0]


def test_weights_that_are_not_finite_never_reach_a_checkpoint(config, tmp_path, monkeypatch):
    plain_batch, taken = StageLoop._train_batch, []

    def breaking(loop, batch):
        plain_batch(loop, batch)
        taken.append(batch)
        if len(taken) == 4:  # as an infinite gradient of a finite loss does
            next(loop.stage.model.projection.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(StageLoop, "_train_batch", breaking)
    with pytest.raises(
        TrainingError, match=r"stage 2, .*got values in projection\.0\.weight that are not finite, wanted"
    ):
        train(config, tmp_path)
    state = load_state(tmp_path)
    assert (state["stage"], state["epoch"], state["step"]) == (2, 0, 1)
    assert all(torch.isfinite(value).all() for value in state["model"].values())
