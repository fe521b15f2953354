"""Every method of the table trains, resumes, is exported and scores through the same commands."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

from export.trt import Options, export_run
from runtime import Detector
from train.checkpoint import load_calibration, load_detector
from train.config import CacheConfig, ModelConfig, Stage2Config
from train.data import load_split
from train.encoder import load_encoder
from train.errors import ConfigError
from train.methods import METHODS, check_method
from train.run import main, parse_options, train
from train.scoring import score_pictures

WITHOUT_TRACES = [name for name, method in METHODS.items() if not method.natural_traces]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})


def config_of(data, method):
    return dataclasses.replace(
        tiny_config(data, model=ModelConfig("test_resnet", "none", classifier_input="encoder"), checkpoint_steps=1),
        method=method,
        stage2=Stage2Config(epochs=6, batch_size=5, lr=0.05),
    )


@pytest.fixture(scope="module", params=WITHOUT_TRACES)
def finished(request, data, tmp_path_factory):
    run = tmp_path_factory.mktemp(request.param)
    train(config_of(data, request.param), run)
    return request.param, run


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_method_learns_by_cross_entropy_alone(finished):
    _, run = finished
    lines = history(run)
    assert {line["stage"] for line in lines} == {2}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "contrastive" not in lines[0]
    assert not (run / "stage1.safetensors").exists()


def test_only_what_the_method_trains_has_changed(finished):
    method, run = finished
    torch.manual_seed(1)  # seed + 1, as training draws it
    encoder = load_encoder("test_resnet", "none")
    trained = load_file(run / "stage2.safetensors")
    weights = {name for name, _ in encoder.named_parameters()}
    state = encoder.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(trained[f"encoder.{name}"], value)}
    if METHODS[method].trains_encoder:
        assert len(changed & weights) > 0.9 * len(weights)
    else:
        assert not changed
    assert not trained["mean_trace"].any()


def test_resumed_run_gives_the_same_numbers(finished, data, tmp_path):
    method, run = finished
    with stopping_after(4), pytest.raises(KeyboardInterrupt):
        train(config_of(data, method), tmp_path)
    assert main(["--resume", str(tmp_path)]) == 0
    theirs = load_file(run / "stage2.safetensors")
    for name, value in load_file(tmp_path / "stage2.safetensors").items():
        assert torch.equal(value, theirs[name]), name
    assert history(tmp_path) == history(run)


def test_exported_model_scores_as_the_trained_one(finished, data, tmp_path):
    _, run = finished
    export_run(Options(run=run, model=tmp_path / "bundle", engine=False, fp32=True))
    records = load_split(data, "val").records[:4]
    expected = load_calibration(run).fake_probability(
        score_pictures(load_detector(run), records, progress=False).logits
    )
    with Detector.load(tmp_path / "bundle", backend="onnxruntime", precision="fp32") as detector:
        found = detector.predict([record.path for record in records])
    assert [d.error for d in found] == [None] * 4
    np.testing.assert_allclose([d.fake_probability for d in found], expected, rtol=1e-3)
    assert [d.trace_similarity for d in found] == [0.0] * 4


def test_probe_on_cached_embeddings_gives_the_results_of_one_without(data, tmp_path):
    for name, cached in (("plain", False), ("cached", True)):
        (tmp_path / name).mkdir()
        cache = CacheConfig(cached_views=2, cache_features=cached)
        train(dataclasses.replace(config_of(data, "probe"), cache=cache), tmp_path / name)
    mine, theirs = (load_file(tmp_path / name / "stage2.safetensors") for name in ("cached", "plain"))
    torch.testing.assert_close(mine["classifier.weight"], theirs["classifier.weight"], rtol=1e-5, atol=1e-6)


def test_command_line_sets_what_the_method_reads(data):
    options = parse_options(["--data", str(data), "--method", "probe"])
    assert options.run.model.classifier_input == "encoder"
    assert parse_options(["--data", str(data)]).run.model.classifier_input == "both"


def test_options_that_a_method_has_no_use_for_are_refused(data):
    with pytest.raises(ConfigError, match=r"--cache-features: got --method bce, which trains the encoder"):
        check_method(dataclasses.replace(config_of(data, "bce"), cache=CacheConfig(cache_features=True)))
    unread = dataclasses.replace(config_of(data, "probe"), model=ModelConfig(classifier_input="both"))
    with pytest.raises(ConfigError, match=r"--method probe: got --classifier-input both, wanted encoder"):
        check_method(unread)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("bce", {"model": {"standardize": True}}, "--standardize: got --method bce, which trains the encoder"),
        ("ntf", {"model": {"standardize": True}}, "--standardize: got --stage1.train-encoder, which trains the"),
        ("probe", {"stage2": {"train_encoder_blocks": 1}}, "--stage2.train-encoder-blocks 1: got --method probe"),
        (
            "ntf",
            {"stage2": {"train_encoder_blocks": 1}, "cache": {"cache_features": True}},
            "--cache-features: got --stage2.train-encoder-blocks 1, which trains the encoder",
        ),
    ],
)
def test_options_of_a_frozen_encoder_are_refused_where_it_is_trained(data, method, changes, message):
    config = config_of(data, method)
    parts = {part: dataclasses.replace(getattr(config, part), **values) for part, values in changes.items()}
    with pytest.raises(ConfigError, match=message):
        check_method(dataclasses.replace(config, **parts))


def test_run_without_natural_traces_is_not_adapted(finished, capsys):
    method, run = finished
    assert main(["--adapt-real", "x", "--run", str(run)]) == 2
    assert f"got a run of --method {method}, wanted one with natural traces" in capsys.readouterr().err
