"""Embeddings by pixels: computed once, shared by stages, runs and evaluations, and the same as without."""

from __future__ import annotations

import dataclasses
import sqlite3

import numpy as np
import pytest
import torch
from training import GENERATOR, tiny_config, write_pictures

from train.checkpoint import load_detector
from train.config import CacheConfig, ModelConfig, Stage1Config
from train.data import load_split
from train.embedding_store import EmbeddingStore
from train.encoder import Encoder
from train.errors import TrainingError
from train.evaluate import evaluate_run
from train.evaluation_config import EvaluationConfig
from train.model import TraceModel
from train.run import train
from train.scoring import score_pictures
from train.validation_scores import load_validation_scores


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TraceModel(Encoder("test_resnet", depths=(1, 3)), 16).eval()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))


def counted(model, monkeypatch):
    """Numbers of pictures in the encoder's forward passes."""
    passes, plain = [], Encoder.features

    def features(self, pixels):
        passes.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(Encoder, "features", features)
    return passes


@torch.no_grad()
def test_images_are_computed_once_and_come_back_in_their_order(model, images, tmp_path, monkeypatch):
    expected = model.embed(images)
    passes = counted(model, monkeypatch)
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    torch.testing.assert_close(model.embed(images[:3]), expected[:3])
    mixed = [4, 0, 2, 0, 3]
    torch.testing.assert_close(model.embed(images[mixed]), expected[mixed], rtol=1e-5, atol=1e-6)
    assert passes == [3, 2]
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-5, atol=1e-6)
    assert passes == [3, 2]


@torch.no_grad()
def test_fewer_depths_are_read_from_what_more_have_left(model, images, tmp_path, monkeypatch):
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    whole = model.embed(images)
    passes = counted(model, monkeypatch)
    shallow = TraceModel(Encoder("test_resnet"), 16).eval()
    shallow.encoder.store = EmbeddingStore(tmp_path, "weights")
    assert torch.equal(shallow.embed(images), whole[:, : shallow.encoder.width])
    assert passes == []
    other = TraceModel(Encoder("test_resnet", depths=(2,)), 16).eval()
    other.encoder.store = EmbeddingStore(tmp_path, "weights")
    other.embed(images)
    assert passes == [5]


@torch.no_grad()
def test_other_weights_and_other_arithmetic_are_other_entries(model, images, tmp_path, monkeypatch):
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    exact = model.embed(images)
    passes = counted(model, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model.embed(images)
    assert passes == [5]
    assert not torch.equal(coarse, exact)
    assert torch.equal(model.embed(images), exact)
    model.encoder.store = EmbeddingStore(tmp_path, "other")
    model.embed(images)
    assert passes == [5, 5]


def test_gradients_go_past_the_store(model, images, tmp_path):
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    model.embed(images).sum().backward()
    assert model.encoder.net.conv1[0].weight.grad is not None


def test_damaged_file_is_refused_with_a_remedy(tmp_path):
    path = EmbeddingStore(tmp_path / "other", "weights").path
    (tmp_path / path.name).write_bytes(b"not a database" * 1000)
    with pytest.raises(TrainingError, match=r"wanted a file of embeddings that can be read and written: .*delete"):
        EmbeddingStore(tmp_path, "weights")


def frozen_config(data, store):
    config = tiny_config(data, cache=CacheConfig(cache_dir=str(store), cached_views=1, view_seed=0))
    return dataclasses.replace(
        config,
        model=ModelConfig(encoder="test_resnet", encoder_weights="none", encoder_depths=(1,)),
        stage1=Stage1Config(epochs=2, batch_size=4, lr=0.01, train_encoder=False),
    )


def test_second_run_and_evaluation_compute_nothing_and_say_the_same(tmp_path, monkeypatch):
    data = write_pictures(tmp_path / "data", counts={"train": 8, "val": 10, "test": 10})
    config = frozen_config(data, tmp_path / "store")
    passes = counted(None, monkeypatch)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    train(config, tmp_path / "first")
    cached = EvaluationConfig(cache_dir=tmp_path / "store", draws=10)
    first = evaluate_run(tmp_path / "first", data, cached, progress=False)
    assert passes
    passes.clear()
    train(config, tmp_path / "second")
    second = evaluate_run(tmp_path / "second", data, cached, progress=False)
    assert passes == []
    assert first.generators == second.generators
    assert first.generators[0].name == GENERATOR
    plain = evaluate_run(tmp_path / "first", data, EvaluationConfig(draws=10), progress=False)
    assert plain.generators[0].metrics.ap == pytest.approx(first.generators[0].metrics.ap, abs=1e-6)
    with sqlite3.connect(next((tmp_path / "store").glob("*.sqlite"))) as database:
        parts = {part for (part,) in database.execute("SELECT DISTINCT part FROM rows")}
    assert parts == {"output", "depth 1"}


@torch.no_grad()
def test_images_of_the_same_bytes_and_other_shapes_are_other_entries(model, tmp_path, monkeypatch):
    model.encoder.store = EmbeddingStore(tmp_path, "weights")
    passes = counted(model, monkeypatch)
    pixels = torch.arange(96 * 64 * 3).remainder(256).to(torch.uint8)
    model.embed(pixels.reshape(1, 96, 64, 3))
    model.embed(pixels.reshape(1, 64, 96, 3))
    assert passes == [1, 1]


def test_run_that_trains_the_encoder_says_that_it_looks_nothing_up(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", counts={"train": 4, "val": 10})
    config = tiny_config(data, cache=CacheConfig(cache_dir=str(tmp_path / "store")))
    (tmp_path / "run").mkdir()
    train(config, tmp_path / "run")
    assert "note: the encoder is trained or compiled" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@torch.no_grad()
def test_encoder_of_both_reads_what_those_of_pixels_and_residuals_have_left(model, images, tmp_path, monkeypatch):
    passes, rows = counted(model, monkeypatch), {}
    for reads in ("rgb", "residual", "both"):
        reader = TraceModel(Encoder("test_resnet", depths=(1, 3), reads=reads), 16).eval()
        reader.encoder.load_state_dict(model.encoder.state_dict())
        reader.encoder.store = EmbeddingStore(tmp_path, "weights")
        rows[reads] = reader.embed(images)
    assert passes == [5, 5]
    assert torch.equal(rows["both"], torch.cat((rows["rgb"], rows["residual"]), dim=1))
    assert not torch.equal(rows["rgb"], rows["residual"])


@pytest.mark.parametrize("reads", ["residual", "both"])
def test_run_on_residuals_goes_through_its_caches_and_is_loaded_as_it_was_trained(tmp_path, reads):
    data = write_pictures(tmp_path / "data", counts={"train": 8, "val": 10})
    config = frozen_config(data, tmp_path / "store")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder_input=reads, standardize=True),
        cache=dataclasses.replace(config.cache, cache_features=True),
    )
    (tmp_path / "run").mkdir()
    train(config, tmp_path / "run")
    detector = load_detector(tmp_path / "run")
    assert detector.encoder.reads == reads
    found = score_pictures(detector, load_split(data, "val").records, progress=False).logits
    np.testing.assert_allclose(found, load_validation_scores(tmp_path / "run").logits, rtol=1e-4, atol=1e-4)
