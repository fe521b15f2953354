"""Every method of the table trains, resumes, is exported and scores through the same commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from exported import EXPORT_OPTIONS
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from training import stopping_after, tiny_config, write_pictures

from export.onnx_export import onnx_from_model
from export.trt import main as export
from export.verify import main as verify
from runtime import Detector
from train.checkpoint import load_calibration, load_detector
from train.config import CacheConfig, ModelConfig, Stage2Config, config_from_dict, preset_config
from train.data import load_split
from train.encoder_weights import load_encoder
from train.errors import ConfigError, DataError
from train.evaluate import evaluate_run
from train.evaluation_config import EvaluationConfig
from train.methods import METHODS, check_method, with_method
from train.run import main, train
from train.run_options import parse_options
from train.scoring import score_pictures

WITHOUT_TRACES = [name for name, method in METHODS.items() if not method.natural_traces]
# One for each way to train without traces; the others differ from bce by starting values alone.
BY_GRADIENT = ["bce", "probe"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10, "test": 4})


def config_of(data, method):
    """What `--method` gives, on random weights of a tiny encoder."""
    stage2 = Stage2Config(epochs=6, batch_size=5, lr=0.05)
    config = with_method(tiny_config(data, stage2=stage2, checkpoint_steps=1), method)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, encoder="test_resnet", encoder_weights="none")
    )


@pytest.fixture(scope="module")
def run_of(data, tmp_path_factory):
    """The finished run of a method, trained where it is first asked for."""
    runs = {}

    def finished(method):
        if method not in runs:
            runs[method] = tmp_path_factory.mktemp(method)
            train(config_of(data, method), runs[method])
        return runs[method]

    return finished


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_weights(mine, theirs):
    expected = load_file(theirs / "stage2.safetensors")
    for name, value in load_file(mine / "stage2.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("method", BY_GRADIENT)
def test_method_learns_by_cross_entropy_alone(run_of, method):
    run = run_of(method)
    lines = history(run)
    assert {line["stage"] for line in lines} == {2}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "contrastive" not in lines[0]
    assert not (run / "stage1.safetensors").exists()


@pytest.mark.parametrize("method", [*BY_GRADIENT, "nearest"])
def test_only_what_the_method_trains_has_changed(run_of, method):
    torch.manual_seed(1)  # seed + 1, as training draws it
    encoder = load_encoder("test_resnet", "none")
    trained = load_file(run_of(method) / "stage2.safetensors")
    weights = {name for name, _ in encoder.named_parameters()}
    state = encoder.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(trained[f"encoder.{name}"], value)}
    if METHODS[method].trains_encoder:
        assert len(changed & weights) > 0.9 * len(weights)
    else:
        assert not changed
    assert not trained["mean_trace"].any()


@pytest.mark.parametrize("method", BY_GRADIENT)
def test_resumed_run_gives_the_same_numbers(run_of, data, tmp_path, method):
    with stopping_after(4), pytest.raises(KeyboardInterrupt):
        train(config_of(data, method), tmp_path)
    assert main(["--resume", str(tmp_path)]) == 0
    assert_same_weights(tmp_path, run_of(method))
    assert history(tmp_path) == history(run_of(method))


# Only the classifier of "nearest" is another graph than what the tests of export have.
@pytest.mark.parametrize(
    "method", [name if name == "nearest" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_method_is_evaluated_exported_verified_and_served(data, tmp_path, run_of, method, monkeypatch):
    monkeypatch.setattr("export.bundle_checks.BATCH", 8)  # for speed
    run, bundle = run_of(method), tmp_path / "bundle"
    report = evaluate_run(run, data, EvaluationConfig(draws=20), progress=False)
    assert report.pictures == 8
    assert report.generators[0].metrics.ap > 0.8
    assert export(["--run", str(run), "--model", str(bundle), "--no-engine", *EXPORT_OPTIONS]) == 0
    assert verify(["--model", str(bundle), "--run", str(run), "--out", str(tmp_path / "verified")]) == 0
    records = load_split(data, "val").records
    logits = score_pictures(load_detector(run), records, progress=False).logits
    expected = load_calibration(run).fake_probability(logits)
    for precision in ("fp32", "fp16", "int8"):
        with Detector.load(bundle, backend="onnxruntime", precision=precision) as detector:
            found = detector.predict([record.path for record in records])
        assert [d.error for d in found] == [None] * len(records)
        probabilities = [d.fake_probability for d in found]
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if precision == "fp32" else {"atol": 0.15}
        np.testing.assert_allclose(probabilities, expected, **tolerance)
        if not METHODS[method].natural_traces:
            assert {d.trace_similarity for d in found} == {0.0}


def test_probe_on_cached_embeddings_gives_the_results_of_one_without(data, tmp_path):
    for name, cached in (("plain", False), ("cached", True)):
        (tmp_path / name).mkdir()
        cache = CacheConfig(cached_views=2, cache_features=cached)
        train(dataclasses.replace(config_of(data, "probe"), cache=cache), tmp_path / name)
    mine, theirs = (load_file(tmp_path / name / "stage2.safetensors") for name in ("cached", "plain"))
    torch.testing.assert_close(mine["classifier.weight"], theirs["classifier.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "encoder"),
    [
        ("gragnaniello2021", "test_resnet"),
        pytest.param("gragnaniello2021", "tf_efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("wang2020", "resnet50", marks=pytest.mark.slow),
        pytest.param("xception", "legacy_xception", marks=pytest.mark.slow),
    ],
)
def test_encoder_of_the_method_is_trained_and_exported(data, tmp_path, method, encoder):
    config = config_of(data, method)
    model = dataclasses.replace(config.model, encoder=encoder)
    config = dataclasses.replace(config, model=model, stage2=Stage2Config(epochs=1, batch_size=6, lr=0.001))
    with contextlib.suppress(DataError):  # a network after two steps from random weights may rank backwards
        train(config, tmp_path)
    detector = load_detector(tmp_path)
    onnx_from_model(detector)  # refuses a graph that differs from PyTorch
    assert detector.input_size == {"test_resnet": (160, 160), "legacy_xception": (299, 299)}.get(encoder, (224, 224))


@pytest.mark.parametrize("method", ["probe", "nearest"])
def test_pictures_smaller_than_the_encoder_wants_are_taken(tmp_path, method):
    small = write_pictures(tmp_path / "small", counts={"train": 4, "val": 10}, side=64)
    (tmp_path / "run").mkdir()
    train(config_of(small, method), tmp_path / "run")
    records = load_split(small, "val").records
    logits = score_pictures(load_detector(tmp_path / "run"), records, progress=False).logits
    assert average_precision_score([record.label for record in records], logits) > 0.8


def model_of(*arguments):
    return parse_options(["--data", "x", *arguments]).run.model


def test_command_line_says_what_the_encoder_reads():
    assert model_of().encoder_input == "rgb"
    assert model_of("--encoder-input", "residual").encoder_options()["reads"] == "residual"


def test_command_line_sets_what_the_method_reads():
    assert model_of("--method", "probe").classifier_input == "encoder"
    assert model_of().classifier_input == "both"


@pytest.mark.parametrize("preset", ["demo", "paper"])
def test_method_sets_encoder_and_augmentation_on_any_preset(preset):
    base = ["--data", "x", "--preset", preset]
    wang = parse_options([*base, "--method", "wang2020"]).run
    assert (wang.model.encoder, wang.model.encoder_weights, wang.model.early_downsampling) == ("resnet50", "", True)
    augment = wang.augment
    assert (augment.blur_share, augment.blur_sigma, augment.jpeg_share, augment.jpeg_quality) == (
        0.5,
        (0.0, 3.0),
        0.5,
        (30, 100),
    )
    assert augment.noise_share == 0
    assert wang.stage2 == preset_config(preset).stage2
    strong = parse_options([*base, "--method", "gragnaniello2021"]).run
    assert not strong.model.early_downsampling
    assert min(strong.augment.noise_share, strong.augment.rescale_share, strong.augment.colour_jitter) > 0
    assert parse_options([*base, "--method", "xception"]).run.model.encoder == "legacy_xception"


def test_explicit_option_wins_over_the_method_wherever_it_stands():
    for arguments in (
        ["--method", "wang2020", "--encoder", "test_resnet", "--encoder-weights", "none", "--blur-share", "0.1"],
        ["--blur-share", "0.1", "--encoder-weights", "none", "--encoder", "test_resnet", "--method=wang2020"],
    ):
        run = parse_options(["--data", "x", *arguments]).run
        assert (run.method, run.model.encoder, run.model.encoder_weights) == ("wang2020", "test_resnet", "none")
        assert (run.augment.blur_share, run.augment.jpeg_share) == (0.1, 0.5)
    assert model_of("--method", "gragnaniello2021", "--early-downsampling").early_downsampling


def test_configuration_file_keeps_its_values_until_another_method_is_named(tmp_path):
    path = tmp_path / "config.json"
    kept = config_of("x", "wang2020")
    path.write_text(json.dumps(dataclasses.asdict(kept)))
    assert parse_options(["--config", str(path)]).run == kept
    assert parse_options(["--config", str(path), "--method", "wang2020"]).run == kept
    other = parse_options(["--config", str(path), "--method", "xception", "--stage2.lr", "0.5"]).run
    assert (other.method, other.model.encoder, other.stage2.lr) == ("xception", "legacy_xception", 0.5)
    assert other.stage2.epochs == kept.stage2.epochs


def test_file_that_says_little_has_the_rest_from_its_method():
    config = config_from_dict({"method": "gragnaniello2021", "augment": {"blur_share": 0.25}}, source="test")
    assert (config.model.encoder, config.model.early_downsampling) == ("resnet50", False)
    assert config.model.classifier_input == "encoder"
    assert (config.augment.blur_share, config.augment.noise_share) == (0.25, 0.5)


@pytest.mark.parametrize(("method", "encoder"), [("wang2020", "resnet50"), ("xception", "legacy_xception")])
def test_weights_that_no_package_has_must_be_named_before_anything_is_done(data, tmp_path, capsys, method, encoder):
    arguments = ["--data", str(data), "--method", method, "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert f"--encoder-weights: got nothing, wanted a file with pretrained weights of {encoder}" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--encoder-weights", "none.safetensors"]) == 2
    assert "none.safetensors: got no such file, wanted a weight file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_that_a_method_has_no_use_for_are_refused(data):
    with pytest.raises(ConfigError, match=r"--cache-features: got --method bce, which trains the encoder"):
        check_method(dataclasses.replace(config_of(data, "bce"), cache=CacheConfig(cache_features=True)))
    unread = dataclasses.replace(config_of(data, "probe"), model=ModelConfig(classifier_input="both"))
    with pytest.raises(ConfigError, match=r"--method probe: got --classifier-input both, wanted encoder"):
        check_method(unread)
    with pytest.raises(ConfigError, match=r"--method probe: got --classifier-input both, wanted encoder"):
        model_of("--method", "probe", "--classifier-input", "both")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("bce", {"model": {"standardize": True}}, "--standardize: got --method bce, which trains the encoder"),
        ("ntf", {"model": {"standardize": True}}, "--standardize: got --stage1.train-encoder, which trains the"),
        (
            "bce",
            {"model": {"encoder_input": "both"}},
            "--encoder-input both: got --method bce, which trains the encoder",
        ),
        ("ntf", {"model": {"encoder_input": "both"}}, "--encoder-input both: got --stage1.train-encoder, wanted a fro"),
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


@pytest.mark.parametrize("method", ["probe", "nearest"])
def test_run_without_natural_traces_is_not_adapted(run_of, capsys, method):
    assert main(["--adapt-real", "x", "--run", str(run_of(method))]) == 2
    assert f"got a run of --method {method}, wanted one with natural traces" in capsys.readouterr().err
