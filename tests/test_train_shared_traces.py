"""Stage 1 that another run has trained: the same weights as training it again, or a refusal that names what differs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

from train.config import LossConfig, ModelConfig, Stage1Config, Stage2Config, config_from_dict
from train.errors import CheckpointError, ConfigError
from train.run import main, train
from train.shared_traces import trace_options


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})


@pytest.fixture(scope="module")
def config(data):
    return tiny_config(data, stage2=Stage2Config(epochs=1, batch_size=6, lr=0.05), checkpoint_steps=1)


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("source")
    train(config, run)
    return run


@pytest.fixture(scope="module")
def other(config):
    """Differs in stage 2 alone."""
    return dataclasses.replace(
        config,
        loss=LossConfig(eta=0.1, scl_form="log_mean"),
        model=ModelConfig("test_resnet", "none", classifier_input="both"),
    )


@pytest.fixture(scope="module")
def trained_again(other, tmp_path_factory):
    run = tmp_path_factory.mktemp("again")
    train(other, run)
    return run


def lines(run):
    read = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def assert_same_run(mine, theirs):
    for name in ("stage1.safetensors", "stage2.safetensors"):
        expected = load_file(theirs / name)
        for key, value in load_file(mine / name).items():
            assert torch.equal(value, expected[key]), f"{name} {key}"
    assert lines(mine) == lines(theirs)
    assert (mine / "calibration.json").read_bytes() == (theirs / "calibration.json").read_bytes()


def test_stage_one_that_was_taken_over_gives_the_weights_of_one_trained_again(
    source, other, trained_again, tmp_path, monkeypatch
):
    trained = []
    plain = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: (trained.append(1), plain(*a, **k))[1])
    train(other, tmp_path, stage1_from=source)
    assert len(trained) == 2  # one epoch of stage 2, 12 pictures in batches of 6
    assert_same_run(tmp_path, trained_again)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["stage1_from"]["run"] == str(source)
    assert "stage1_from" not in json.loads((trained_again / "config.json").read_text())


@pytest.mark.parametrize("steps", [0, 1])
def test_run_that_took_stage_one_over_resumes_with_and_without_the_source(
    source, other, trained_again, tmp_path, steps
):
    run, alone = tmp_path / "run", tmp_path / "alone"
    run.mkdir()
    with stopping_after(steps), pytest.raises(KeyboardInterrupt):
        train(other, run, stage1_from=source)
    shutil.copytree(run, alone)
    train(other, run, resume=True, stage1_from=source)
    assert_same_run(run, trained_again)
    assert main(["--resume", str(alone)]) == 0
    assert_same_run(alone, trained_again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "got seed = 0, wanted seed = 1"),
        ({"loss": LossConfig(lambda_het=0.5)}, r"got loss.lambda_het = 1.0, wanted loss.lambda_het = 0.5"),
        ({"stage1": Stage1Config(epochs=1, batch_size=4, lr=0.01)}, "got stage1.epochs = 2, wanted stage1.epochs = 1"),
        ({"train_share": 0.5}, "got real training pictures = "),
    ],
)
def test_another_stage_one_is_refused_by_what_differs(source, config, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        train(dataclasses.replace(config, **change), tmp_path, stage1_from=source)
    assert not list(tmp_path.iterdir())


def test_other_fakes_with_the_same_real_pictures_may_share(source, config, data, tmp_path):
    moved = data / "train" / "halved" / "1_fake" / "005.png"
    content = moved.read_bytes()
    moved.unlink()
    try:
        train(config, tmp_path, stage1_from=source)
    finally:
        moved.write_bytes(content)
    mine, theirs = (load_file(run / "stage1.safetensors") for run in (tmp_path, source))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_run_that_has_no_stage_one_or_does_not_describe_it_is_refused(source, config, tmp_path):
    probe = dataclasses.replace(
        config, method="probe", model=ModelConfig("test_resnet", "none", classifier_input="encoder")
    )
    with pytest.raises(ConfigError, match=r"--stage1-from .*: got --method probe"):
        train(probe, tmp_path, stage1_from=source)
    old = shutil.copytree(source, tmp_path / "old")
    recorded = json.loads((old / "config.json").read_text())
    del recorded["trace_basis"]
    (old / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(CheckpointError, match="does not say what its stage 1 depends on"):
        train(config, tmp_path / "new", stage1_from=old)
    (old / "stage1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"wanted a finished run with stage1.safetensors"):
        train(config, tmp_path / "new", stage1_from=old)


def test_command_line_takes_stage_one_over_and_a_resume_does_not_ask_again(source, config, tmp_path, capsys):
    (tmp_path / "start.json").write_text(json.dumps(dataclasses.asdict(config)))
    run = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "start.json"), "--out", str(run), "--stage1-from", str(source)]
    assert main([*arguments, "--eta", "0.25"]) == 0
    assert f"stage 1 taken from {source}" in capsys.readouterr().out
    assert main(["--resume", str(run), "--stage1-from", str(source)]) == 2
    assert "got further options" in capsys.readouterr().err


def test_options_that_stage_two_alone_reads_are_no_part_of_stage_one(config):
    changed = {
        "loss": {"eta": 0.9, "gamma": 0.1, "scl_form": "literal", "scl_denominator": "negatives", "scl_weight": 0.0},
        "stage2": {"scl_crop": 160, "trace_crop": "scl", "epochs": 3, "lr": 0.1},
        "model": {"classifier_input": "both"},
        "decision": {"real_flagged_rate": 0.2},
    }
    same = config_from_dict(changed, source="test", defaults=config)
    assert trace_options(same) == trace_options(config)
    for part, option, value in (("loss", "orth", "abs"), ("augment", "grey", 0.5), ("model", "embedding_dim", 64)):
        differs = config_from_dict({part: {option: value}}, source="test", defaults=config)
        assert trace_options(differs) != trace_options(config)
