"""The implementation of the loss: chosen before any work, printed, kept through a resume."""

from __future__ import annotations

import dataclasses
import json

import pytest
from training import tiny_config, write_pictures

import train.stages as stages
from cpp_ext.library import BuildError
from train.checkpoint import load_state
from train.errors import CheckpointError, ConfigError
from train.loss_backend import choose_loss_backend, resumed_loss_backend
from train.run import main, train
from train.run_options import parse_options

NOT_BUILT = BuildError(
    "the fused loss", got="no library", wanted="a current library", remedy="run python -m cpp_ext.build"
)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr("train.loss_backend.fused_problem", lambda device: NOT_BUILT)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr("train.loss_backend.fused_problem", lambda device: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})


def config_of(data, backend):
    config = tiny_config(data)
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, loss_backend=backend),
        stage1=dataclasses.replace(config.stage1, epochs=1),
    )


def test_option_is_read_from_the_command_line():
    assert parse_options([]).run.loss.loss_backend == "auto"
    assert parse_options(["--loss-backend", "reference"]).run.loss.loss_backend == "reference"


def test_auto_takes_the_fused_loss_where_it_is_built(built):
    assert choose_loss_backend("auto", "cpu").name == choose_loss_backend("fused", "cpu").name == "fused"
    assert choose_loss_backend("reference", "cpu").describe() == (
        "soft contrastive loss: reference (as --loss-backend says)"
    )


def test_auto_says_why_it_takes_the_reference_and_what_to_run(not_built):
    chosen = choose_loss_backend("auto", "cpu")
    assert chosen.name == "reference"
    assert chosen.describe().endswith("got no library, wanted a current library: run python -m cpp_ext.build)")


def test_fused_that_is_not_built_is_refused_before_any_work(not_built, data, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"--loss-backend fused: got no library.*run python -m cpp_ext.build"):
        choose_loss_backend("fused", "cpu")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.json").write_text("{}")
    command = ["--data", str(data), "--loss-backend", "fused", "--device", "cpu", "--overwrite", "--out"]
    assert main([*command, str(earlier)]) == 2
    assert main([*command, str(tmp_path / "new")]) == 2
    assert "--loss-backend fused: got no library" in capsys.readouterr().err
    assert (earlier / "config.json").read_text() == "{}"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("state", [{"loss_backend": "reference"}, {}], ids=["reference", "from before the choice"])
def test_resumed_run_stays_with_the_reference_though_the_fused_loss_is_built(built, tmp_path, state):
    assert resumed_loss_backend(state, "cpu", tmp_path).name == "reference"


def test_resumed_run_stays_with_the_fused_loss_or_is_refused(built, tmp_path, monkeypatch):
    assert resumed_loss_backend({"loss_backend": "fused"}, "cpu", tmp_path).name == "fused"
    monkeypatch.setattr("train.loss_backend.fused_problem", lambda device: NOT_BUILT)
    with pytest.raises(CheckpointError, match=r"got no library, wanted the fused loss, with which the run began: run "):
        resumed_loss_backend({"loss_backend": "fused"}, "cpu", tmp_path)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_training_uses_prints_and_records_the_implementation(data, tmp_path, monkeypatch, capsys, backend):
    expected = choose_loss_backend(backend, "cpu")
    used = []
    plain = stages.gathered_soft_contrastive_loss

    def recording(*tensors, **options):
        used.append(options["backend"])
        return plain(*tensors, **options)

    monkeypatch.setattr(stages, "gathered_soft_contrastive_loss", recording)
    train(config_of(data, backend), tmp_path)
    assert set(used) == {expected.name}
    assert expected.describe() in capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["environment"]["loss_backend"]["name"] == expected.name
    assert written["config"]["loss"]["loss_backend"] == backend
    assert load_state(tmp_path)["loss_backend"] == expected.name


def test_run_that_began_with_the_reference_resumes_with_it_once_the_fused_loss_is_built(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("train.loss_backend.fused_problem", lambda device: NOT_BUILT)
    train(config_of(data, "auto"), tmp_path)
    monkeypatch.setattr("train.loss_backend.fused_problem", lambda device: None)
    capsys.readouterr()
    assert main(["--resume", str(tmp_path)]) == 0
    assert "soft contrastive loss: reference (as the run began)" in capsys.readouterr().out
