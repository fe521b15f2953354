"""A finished run goes on with a user's own unlabelled real pictures, into a new run that says where it is from."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

from export.run_inputs import load_run
from runtime.manifest import sha256_of
from train.adaptation import own_pictures
from train.checkpoint import load_calibration, load_config, load_detector
from train.config import ModelConfig, Stage1Config, Stage2Config
from train.data import load_split
from train.loop import StageLoop
from train.run import load_training_data, main, train
from train.run_options import parse_options
from train.scoring import score_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adaptation")


@pytest.fixture(scope="module")
def data(folder):
    return write_pictures(folder / "data", counts={"train": 6, "val": 10})


@pytest.fixture(scope="module")
def own(folder):
    made = write_pictures(folder / "made", counts={"train": 24}, seed=7)
    shutil.copytree(made / "train" / "halved" / "0_real", folder / "own" / "holiday")
    return folder / "own"


@pytest.fixture(scope="module")
def parent(folder, data):
    run = folder / "parent"
    run.mkdir()
    config = tiny_config(
        data,
        model=ModelConfig("test_resnet", "none", classifier_input="both"),
        stage1=Stage1Config(epochs=1, batch_size=4, lr=0.01),
        stage2=Stage2Config(epochs=2, batch_size=6, lr=0.2),
        checkpoint_steps=1,
    )
    train(config, run)
    return run


def command(parent, own, out, *more):
    return ["--adapt-real", str(own), "--run", str(parent), "--out", str(out), *more]


@pytest.fixture(scope="module")
def adapted(parent, own, folder):
    before = {path.name: path.read_bytes() for path in parent.iterdir() if path.is_file()}
    assert main(command(parent, own, folder / "adapted")) == 0
    assert {path.name: path.read_bytes() for path in parent.iterdir() if path.is_file()} == before
    return folder / "adapted"


def test_adapted_run_is_a_whole_run_that_names_its_parent(parent, adapted, own):
    written = json.loads((adapted / "config.json").read_text())
    assert written["parent"] == {
        "run": str(parent),
        "stage1_sha256": sha256_of(parent / "stage1.safetensors"),
        "stage2_sha256": sha256_of(parent / "stage2.safetensors"),
    }
    config = load_config(adapted)
    assert (config.adapt.adapt_real, config.adapt.run) == (str(own), str(parent))
    assert dataclasses.replace(config, adapt=load_config(parent).adapt) == load_config(parent)


def test_stage_one_goes_on_from_the_parent_with_the_users_pictures_alone(parent, own, tmp_path, monkeypatch):
    started = {}

    def remembering(loop):
        started[loop.stage.number] = ([r.path for r in loop.stage.records], dict(loop.stage.model.state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr(StageLoop, "train", remembering)
    assert main(command(parent, own, tmp_path / "run")) == 130
    paths, weights = started[1]
    assert paths
    assert all(path.is_relative_to(own) for path in paths)
    for name, value in load_file(parent / "stage1.safetensors").items():
        assert torch.equal(weights[name], value), name


def test_stage_two_goes_on_from_the_parents_projection_and_classifier(parent, own, tmp_path, monkeypatch):
    started = {}

    def remembering(loop):
        if loop.stage.number == 2:
            started.update(loop.stage.model.state_dict())
            raise KeyboardInterrupt

    monkeypatch.setattr(StageLoop, "train", remembering)
    assert main(command(parent, own, tmp_path / "run")) == 130
    for name, value in load_file(parent / "stage2.safetensors").items():
        if name.startswith(("projection.", "classifier.")):
            assert torch.equal(started[name], value), name


def test_stage_two_takes_the_parents_pictures_and_the_users_as_real(parent, adapted, data, own):
    config = load_config(adapted)
    found = load_training_data(config)
    learnt, held_out = own_pictures(config)
    theirs = load_split(data, "train").records
    assert found.train.records == theirs + learnt
    assert found.traces == learnt
    fakes = [record for record in load_split(data, "val").records if record.label == 1]
    assert found.validation.records == (*fakes, *held_out)
    assert len(held_out) == 10  # as many as a rate of 10 % needs, which is more than a fifth of 24
    assert not {r.path for r in learnt} & {r.path for r in held_out}


def test_thresholds_are_those_of_the_users_held_out_pictures(adapted):
    held_out = own_pictures(load_config(adapted)).held_out
    logits = score_pictures(load_detector(adapted), held_out, progress=False).logits
    flagged = (load_calibration(adapted).verdicts(logits) == "fake").sum()
    assert flagged <= 1


def test_adapted_run_is_exported_with_the_pictures_it_was_calibrated_on(adapted):
    inputs = load_run(adapted)
    assert len(inputs.validation) == 20
    assert inputs.validation_sha256 == json.loads((adapted / "config.json").read_text())["data"]["val_sha256"]


@pytest.mark.parametrize("batches", [2, 7])
def test_adaptation_that_was_stopped_resumes_to_the_same_weights(parent, own, adapted, tmp_path, batches):
    with stopping_after(batches):
        assert main(command(parent, own, tmp_path / "run")) == 130
    assert main(["--resume", str(tmp_path / "run")]) == 0
    theirs = load_file(adapted / "stage2.safetensors")
    for name, value in load_file(tmp_path / "run" / "stage2.safetensors").items():
        assert torch.equal(value, theirs[name]), name


def test_options_of_training_may_change_and_the_networks_may_not(parent, own, capsys):
    options = parse_options(command(parent, own, "x", "--stage1.epochs", "3"))
    assert options.run.stage1.epochs == 3
    assert options.run.stage2 == load_config(parent).stage2
    assert main(command(parent, own, "x", "--embedding-dim", "64")) == 2
    assert main(command(parent, own, "x", "--preset", "paper")) == 2
    told = capsys.readouterr().err
    assert "got another model than" in told
    assert "got another preset or configuration than" in told


def refusal(arguments, capsys):
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_what_cannot_be_adapted_is_refused_with_a_sentence(parent, adapted, own, data, tmp_path, capsys):
    out = tmp_path / "out"
    empty, fakes = tmp_path / "empty", tmp_path / "fakes"
    empty.mkdir()
    shutil.copytree(own, fakes / "1_fake")
    told = refusal(command(parent, empty, out), capsys)
    assert "got 0 pictures, wanted at least 20: half to learn from, half for a rate of 0.1 of real pictures" in told
    assert "got no such folder" in refusal(command(parent, tmp_path / "none", out, "--overwrite"), capsys)
    told = refusal(command(parent, fakes, out, "--overwrite"), capsys)
    assert "in a folder for fakes, wanted real pictures alone" in told
    assert f"wanted a run that was not: adapt {parent} to a folder" in refusal(command(adapted, own, out), capsys)
    assert "got no --adapt-real" in refusal(["--run", str(parent), "--data", str(data), "--out", str(out)], capsys)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((parent / "config.json").read_bytes())
    assert "got a folder without stage2.safetensors" in refusal(command(unfinished, own, out), capsys)


def test_parent_whose_pictures_have_changed_is_refused(parent, own, data, tmp_path, capsys):
    picture = sorted((data / "train").rglob("*.png"))[0]
    original = picture.read_bytes()
    try:
        picture.write_bytes(original + b"\0")
        told = refusal(command(parent, own, tmp_path / "out"), capsys)
    finally:
        picture.write_bytes(original)
    assert "wanted the ones it was trained on" in told
