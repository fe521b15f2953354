"""The nearest neighbours of a picture: what is kept, what it scores, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import tiny_config, write_pictures

import train.nearest as nearest
from train.checkpoint import load_detector
from train.config import AugmentConfig, CacheConfig, ComputeConfig, NearestConfig
from train.config_check import check_config
from train.data import load_split
from train.errors import CheckpointError, ConfigError
from train.methods import check_method, with_method
from train.model import NearestNeighbours
from train.nearest import bank_pictures, refuse_unfit_bank
from train.run import main, train
from train.scoring import embed_pictures, score_pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})


def config_of(data, **changes):
    config = with_method(tiny_config(data), "nearest")
    return dataclasses.replace(config, nearest=NearestConfig(**changes))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    train(config_of(data), run)
    return run


def units(*degrees):
    """Unit vectors (2, n) of a plane."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack((angles.cos(), angles.sin()))


@pytest.mark.parametrize(("k", "fake", "real"), [(1, [60], [20]), (2, [60, 70], [20, 80])])
def test_logit_is_the_difference_of_the_mean_largest_cosines(k, fake, real):
    neighbours = NearestNeighbours(units(-20, 80, 180), units(60, -70, 170), k)
    at_zero = torch.tensor([[3.0, 0.0]], dtype=torch.float64)  # of length 3, which does not count
    expected = np.cos(np.deg2rad(fake)).mean() - np.cos(np.deg2rad(real)).mean()
    torch.testing.assert_close(neighbours(at_zero), torch.tensor([[expected]]))


def test_any_leading_shape_gives_the_rows_logits():
    neighbours = NearestNeighbours(torch.randn(5, 4), torch.randn(5, 3), 2)
    rows = torch.randn(2, 3, 3, 5)
    found = neighbours(rows)
    assert found.shape == (2, 3, 3, 1)
    torch.testing.assert_close(found[1, 2, 0], neighbours(rows[1, 2, 0]))


def test_bank_is_the_unit_embeddings_of_the_training_pictures(finished, data):
    detector, records = load_detector(finished), load_split(data, "train").records
    rows = torch.nn.functional.normalize(embed_pictures(detector, records, batch_size=3), dim=-1)
    label = torch.tensor([record.label for record in records])
    stored = load_file(finished / "stage2.safetensors")
    for name, value in (("real", 0), ("fake", 1)):
        torch.testing.assert_close(stored[f"classifier.{name}"], rows[label == value].T, rtol=1e-4, atol=1e-6)
    logits = torch.from_numpy(score_pictures(detector, records, progress=False).logits)
    cosines = rows @ rows.T
    expected = cosines[:, label == 1].max(1).values - cosines[:, label == 0].max(1).values
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    # A picture of the bank is its own nearest neighbour.
    assert torch.equal(logits > 0, label == 1)


def test_history_says_how_large_the_bank_is(finished):
    (line,) = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert (line["stage"], line["bank_real"], line["bank_fake"], line["val_ap"]) == (2, 6, 6, pytest.approx(1.0))
    assert not (finished / "state.pt").exists()


def test_large_bank_is_drawn_by_the_seed(data):
    records = load_split(data, "train").records
    config = config_of(data, nearest_bank=3)
    drawn = bank_pictures(records, 1, config)
    assert drawn == bank_pictures(records, 1, config)
    assert [record for record in records if record in drawn] == drawn
    assert [record.label for record in drawn] == [1, 1, 1]
    others = [bank_pictures(records, 1, dataclasses.replace(config, seed=seed)) for seed in range(1, 6)]
    assert any(other != drawn for other in others)
    assert len(bank_pictures(records, 0, config_of(data, nearest_bank=0))) == 6


def test_run_says_that_its_bank_is_a_sample_and_keeps_several_neighbours(data, tmp_path, capsys):
    train(config_of(data, nearest_bank=3, nearest_k=2), tmp_path)
    assert "neighbours: 3 real and 3 fake of 12 training pictures, drawn by seed 0" in capsys.readouterr().out
    detector = load_detector(tmp_path)
    assert (detector.classifier.k, detector.classifier.fake.shape) == (2, (96, 3))


def test_run_stopped_in_its_pass_starts_it_again(finished, data, tmp_path, monkeypatch):
    embedded = []

    def stopping(detector, records, **options):
        if embedded:
            raise KeyboardInterrupt
        embedded.append(records)
        return embed_pictures(detector, records, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nearest, "embed_pictures", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config_of(data), tmp_path)
    assert not (tmp_path / "stage2.safetensors").exists()
    assert main(["--resume", str(tmp_path)]) == 0
    expected = load_file(finished / "stage2.safetensors")
    for name, value in load_file(tmp_path / "stage2.safetensors").items():
        assert torch.equal(value, expected[name]), name
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


def test_resume_with_a_configuration_that_was_edited_is_refused(finished, tmp_path, capsys):
    edited = json.loads((finished / "config.json").read_text())
    edited["config"]["nearest"]["nearest_k"] = 2
    (tmp_path / "config.json").write_text(json.dumps(edited))
    assert main(["--resume", str(tmp_path)]) == 2
    assert "got a config.json that was changed, wanted the configuration that the run began" in capsys.readouterr().err


def test_checkpoint_without_a_bank_is_refused(finished, tmp_path):
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    state = load_file(finished / "stage2.safetensors")
    del state["classifier.fake"]
    save_file(state, tmp_path / "stage2.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys missing \['classifier.fake'\]"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": CacheConfig(cache_features=True)}, "got --cache-features, wanted one pass over centre crops"),
        ({"augment": AugmentConfig(blur_share=0.5)}, "got an option of augmentation, wanted one pass"),
        ({"compute": ComputeConfig(precision="bf16")}, "got --precision bf16, wanted one pass"),
        ({"compute": ComputeConfig(compile=True)}, "got --compile, wanted one pass"),
    ],
)
def test_option_that_would_change_nothing_is_refused(data, change, message):
    check_method(config_of(data))
    with pytest.raises(ConfigError, match=f"--method nearest: {message}"):
        check_method(dataclasses.replace(config_of(data), **change))


def test_neighbours_of_another_method_are_refused(data):
    config = dataclasses.replace(with_method(tiny_config(data), "probe"), nearest=NearestConfig(nearest_k=3))
    with pytest.raises(ConfigError, match="--method probe: got --nearest-k or --nearest-bank, wanted --method nearest"):
        check_method(config)


def test_more_neighbours_than_pictures_are_refused(data, tmp_path):
    with pytest.raises(
        ConfigError, match="--nearest-k: got 7 with 6 real and 6 fake training pictures, wanted at most 6"
    ):
        train(config_of(data, nearest_k=7), tmp_path)
    with pytest.raises(ConfigError, match="--nearest-bank: got 2, wanted 0, or at least --nearest-k 3"):
        check_config(config_of(data, nearest_k=3, nearest_bank=2))


def test_bank_that_no_onnx_file_holds_is_refused_with_one_that_does(data):
    config = config_of(data, nearest_bank=200_000)
    refuse_unfit_bank(config, [range(100_000)] * 2, 2048, 25_000_000)
    with pytest.raises(ConfigError, match=r"got 400,000 embeddings of 2048 float32, 3.4 GB.*--nearest-bank 124000"):
        refuse_unfit_bank(config, [range(200_000)] * 2, 2048, 25_000_000)
