"""A whole run: what it leaves, that a resume gives the same numbers, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

import train.stages as stages
from train.checkpoint import load_calibration, load_config, load_detector, load_state, newest_run
from train.config import ModelConfig, Stage2Config
from train.data import load_split
from train.errors import CheckpointError, ConfigError, DataError, TrainingError
from train.metrics import fit_calibration
from train.run import main, train
from train.run_options import parse_options
from train.scoring import mean_natural_trace, score_pictures
from train.validation_scores import load_validation_scores, require_validation_scores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})


@pytest.fixture(scope="module")
def config(data):
    return tiny_config(data, checkpoint_steps=1)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    run.mkdir()
    train(config, run)
    return run


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_run_leaves_every_file(finished, config):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json",
        "stage1.safetensors",
        "stage2.safetensors",
        "state.pt",
        "calibration.json",
        "validation_scores.json",
        "history.jsonl",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    assert load_config(finished) == config
    written = json.loads((finished / "config.json").read_text())
    assert set(written) == {"config", "data", "environment", "start", "trace_basis"}
    assert written["data"]["train_pictures"] == 12
    assert [(r["stage"], r["epoch"]) for r in history(finished)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert {"loss", "hom_std", "hom_effective_rank"} <= set(history(finished)[0])
    assert {"loss", "contrastive", "classification", "val_ap"} <= set(history(finished)[2])


def test_loaded_detector_is_the_trained_one(finished, data):
    detector = load_detector(finished)
    assert not detector.training
    stored = load_file(finished / "stage2.safetensors")
    assert torch.equal(detector.mean_trace, stored["mean_trace"])
    assert torch.linalg.vector_norm(detector.mean_trace) > 0
    records = load_split(data, "val").records
    scores = score_pictures(detector, records, batch_size=7, progress=False)
    again = score_pictures(detector, records[::-1], batch_size=32, progress=False)
    np.testing.assert_allclose(scores.logits, again.logits[::-1], rtol=1e-4, atol=1e-5)
    verdicts = load_calibration(finished).verdicts(scores.logits)
    flagged = sum(v == "fake" for v, r in zip(verdicts, records, strict=True) if r.label == 0)
    assert flagged <= 1  # 10 % of 10 real validation pictures


def test_stage_two_leaves_encoder_and_traces_as_stage_one_made_them(finished):
    first, second = load_file(finished / "stage1.safetensors"), load_file(finished / "stage2.safetensors")
    shared = [name for name in first if name.startswith(("encoder.", "head_hom."))]
    assert shared
    for name in shared:
        assert torch.equal(first[name], second[name]), name


def test_mean_trace_is_the_mean_over_real_training_pictures(finished, data):
    detector = load_detector(finished)
    reals = [record for record in load_split(data, "train").records if record.label == 0]
    expected = mean_natural_trace(detector, reals, batch_size=1)
    torch.testing.assert_close(detector.mean_trace, expected, rtol=1e-4, atol=1e-5)


# Optimiser steps before the stop: in the middle of an epoch of either stage, and at the end of an epoch.
@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_resumed_run_gives_the_same_numbers_as_an_undisturbed_one(config, finished, tmp_path, steps):
    run = tmp_path / "stopped"
    run.mkdir()
    with stopping_after(steps), pytest.raises(KeyboardInterrupt):
        train(config, run)
    state = load_state(run)
    assert (state["stage"], state["epoch"]) != (2, 2)
    assert main(["--resume", str(run)]) == 0
    mine, theirs = load_file(run / "stage2.safetensors"), load_file(finished / "stage2.safetensors")
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name
    assert history(run) == history(finished)
    assert load_calibration(run) == load_calibration(finished)


def test_validation_scores_are_those_that_the_calibration_was_fitted_on(finished, data):
    scores = require_validation_scores(finished)
    records = load_split(data, "val").records
    assert scores.pictures[0] == "val/halved/0_real/000.png"
    assert scores.labels == tuple(record.label for record in records)
    refitted = fit_calibration(*scores.arrays(), real_flagged_rate=0.1, fake_missed_rate=0.1)
    assert refitted == load_calibration(finished)


def test_damaged_validation_scores_are_refused(finished, tmp_path):
    assert load_validation_scores(tmp_path) is None
    plain = json.loads((finished / "validation_scores.json").read_text())
    for change, message in (({"logits": [0.5]}, "got 20 labels, 1 logits"), ({"labels": [2] * 20}, "0 or 1")):
        (tmp_path / "validation_scores.json").write_text(json.dumps(plain | change))
        with pytest.raises(CheckpointError, match=message):
            load_validation_scores(tmp_path)
    (tmp_path / "validation_scores.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_validation_scores(tmp_path)


def test_resuming_a_finished_run_changes_nothing_but_adds_the_scores_that_older_runs_lack(finished):
    names = ("stage2.safetensors", "calibration.json", "validation_scores.json")
    before = [(finished / name).read_bytes() for name in names]
    (finished / "validation_scores.json").unlink()
    with pytest.raises(CheckpointError, match=r"got a run without validation_scores.json.*--resume"):
        require_validation_scores(finished)
    assert main(["--resume", str(finished)]) == 0
    assert [(finished / name).read_bytes() for name in names] == before
    assert len(history(finished)) == 4


def test_another_seed_gives_other_weights(config, finished, tmp_path):
    train(dataclasses.replace(config, seed=1), tmp_path)
    mine, theirs = load_file(tmp_path / "stage2.safetensors"), load_file(finished / "stage2.safetensors")
    assert not torch.equal(mine["projection.0.weight"], theirs["projection.0.weight"])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("loss", {"hom_reduction": "topk", "orth": "abs", "scl_form": "log_mean", "scl_denominator": "negatives"}),
        ("loss", {"hom_reduction": "mean", "orth": "cos", "scl_form": "literal"}),
        ("model", {"classifier_input": "both"}),
        ("model", {"classifier_input": "encoder"}),
        ("stage1", {"train_encoder": False}),
        ("stage2", {"scl_crop": 160, "trace_crop": "scl"}),
    ],
)
def test_every_named_option_trains(config, tmp_path, part, change):
    one_epoch = {
        "stage1": dataclasses.replace(config.stage1, epochs=1),
        "stage2": dataclasses.replace(config.stage2, epochs=1),
    }
    base = dataclasses.replace(config, checkpoint_steps=0, **one_epoch)
    changed = dataclasses.replace(base, **{part: dataclasses.replace(getattr(base, part), **change)})
    with contextlib.suppress(DataError):  # a model this small may rank backwards, which calibration refuses
        train(changed, tmp_path)
    assert (tmp_path / "stage2.safetensors").is_file()
    assert all(np.isfinite(value) for line in history(tmp_path) for value in line.values())


def test_frozen_encoder_of_stage_one_stays_as_it_was_loaded(config, tmp_path, monkeypatch):
    loaded = {}
    plain = stages.TraceStage.__init__

    def remembering(stage, model, *rest):
        loaded.update({name: value.clone() for name, value in model.encoder.state_dict().items()})
        plain(stage, model, *rest)

    monkeypatch.setattr(stages.TraceStage, "__init__", remembering)
    heads_only = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, epochs=1, train_encoder=False))
    with contextlib.suppress(DataError):
        train(heads_only, tmp_path)
    trained = load_file(tmp_path / "stage1.safetensors")
    assert loaded
    for name, value in loaded.items():
        assert torch.equal(trained[f"encoder.{name}"], value), name


def test_loss_that_is_not_a_number_stops_the_run(config, tmp_path):
    exploding = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, lr=1e30))
    with pytest.raises(TrainingError, match=r"stage 1, epoch \d.*got a loss of nan, wanted a finite loss"):
        train(exploding, tmp_path)
    state = load_state(tmp_path)
    assert state["stage"] == 1


def test_small_crops_need_an_encoder_of_free_size(data, tmp_path):
    config = tiny_config(data, encoder="test_vit")
    small = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, epochs=1))
    with pytest.raises(ConfigError, match=r"--stage2.scl-crop: got 32 with test_vit, whose input size is fixed"):
        train(small, tmp_path)


def test_resume_with_other_pictures_is_refused(config, finished, data):
    picture = sorted((data / "train").rglob("*.png"))[0]
    original = picture.read_bytes()
    try:
        picture.write_bytes(original + b"\0")
        with pytest.raises(CheckpointError, match="got pictures with train_sha256"):
            train(config, finished, resume=True)
    finally:
        picture.write_bytes(original)


def test_resume_with_further_options_is_refused(finished):
    with pytest.raises(ConfigError, match="got further options, wanted the run's own configuration"):
        parse_options(["--resume", str(finished), "--eta", "0.9"])


def test_run_folder_is_not_overwritten_unless_told(finished, data, capsys):
    status = main(["--data", str(data), "--out", str(finished)])
    assert status == 2
    assert "wanted a new folder, or an earlier run and --overwrite" in capsys.readouterr().err
    assert load_detector(finished) is not None


def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path, data, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["--data", str(data), "--out", str(tmp_path), "--overwrite"]) == 2
    assert "a folder that is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_options_come_from_preset_file_and_command_line(finished):
    assert parse_options([]).run.preset == "demo"
    paper = parse_options(
        ["--preset", "paper", "--data", "x", "--encoder-weights", "r.safetensors", "--eta", "0.7"]
    ).run
    assert paper.model == ModelConfig("resnet50", "r.safetensors")
    assert paper.loss.eta == 0.7
    again = parse_options(["--config", str(finished / "config.json"), "--stage2.lr", "0.25"]).run
    assert again == dataclasses.replace(
        load_config(finished), stage2=dataclasses.replace(load_config(finished).stage2, lr=0.25)
    )
    assert isinstance(again.stage2, Stage2Config)


def test_unfinished_and_missing_runs_are_told_apart(tmp_path, finished):
    assert newest_run(finished.parent) == finished
    with pytest.raises(CheckpointError, match="got no finished run"):
        newest_run(tmp_path)
    with pytest.raises(CheckpointError, match="got no such folder"):
        load_detector(tmp_path / "none")
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"got a folder without stage2.safetensors"):
        load_detector(tmp_path)


def test_damaged_state_is_refused(finished, tmp_path):
    content = (finished / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="wanted the state that training writes"):
        load_state(tmp_path)
