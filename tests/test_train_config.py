"""Presets say what the paper says; JSON round trips; wrong values are refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train.config import AugmentConfig, config_from_dict, config_from_file, preset_config
from train.config_check import check_config
from train.errors import ConfigError
from train.run_options import parse_options


def test_paper_preset_has_the_papers_settings():
    config = preset_config("paper")
    assert config.model.encoder == "resnet50"
    assert config.model.embedding_dim == 128
    assert (config.stage1.epochs, config.stage2.epochs) == (200, 10)
    for stage in (config.stage1, config.stage2):
        assert (stage.lr, stage.momentum, stage.weight_decay) == (0.1, 0.9, 1e-3)
    assert (config.loss.lambda_orth, config.loss.eta, config.loss.gamma) == (0.1, 0.5, 0.5)
    assert config.stage2.scl_crop == 32
    assert (config.augment.colour_jitter, config.augment.grey) == (0.0, 0.0)


@pytest.mark.parametrize("preset", ["paper", "demo"])
def test_json_round_trip_gives_the_same_configuration(preset, tmp_path):
    config = preset_config(preset)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert config_from_file(path) == config
    path.write_text(json.dumps({"config": dataclasses.asdict(config), "environment": {}}))
    assert config_from_file(path) == config


def test_ranges_of_the_augmentations_come_from_the_command_line_and_from_json(tmp_path):
    given = ["--blur-share", "0.5", "--blur-sigma", "0", "2", "--jpeg-share", "0.1", "--jpeg-quality", "60", "95"]
    config = parse_options(["--data", "x", *given]).run
    assert config.augment == AugmentConfig(blur_share=0.5, blur_sigma=(0.0, 2.0), jpeg_share=0.1, jpeg_quality=(60, 95))
    assert config_from_dict(dataclasses.asdict(config), source="test") == config


def test_configuration_from_before_a_field_existed_is_read_with_its_default():
    values = dataclasses.asdict(preset_config("demo"))
    del values["loss"]["loss_backend"]
    assert config_from_dict(values, source="test") == preset_config("demo")


def test_left_out_fields_are_the_paper_presets():
    config = config_from_dict({"stage1": {"epochs": 3}}, source="test")
    assert config.stage1.epochs == 3
    assert config.stage1.lr == preset_config("paper").stage1.lr
    assert config.model == preset_config("paper").model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage1": {"epoch": 3}}, "test.stage1: got the unknown field 'epoch'"),
        ({"seed": "0"}, "test.seed: got '0'"),
        ({"loss": {"orth": "cosine"}}, "test.loss.orth: got 'cosine'"),
        ([], r"test: got \[\]"),
    ],
)
def test_wrong_json_is_refused_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values, source="test")


def test_file_that_is_missing_or_not_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wanted a JSON file"):
        config_from_file(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="wanted a JSON file"):
        config_from_file(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("loss", {"temperature": 0.0}, "--temperature: got 0.0"),
        ("stage1", {"epochs": 0}, "--stage1.epochs: got 0"),
        ("stage2", {"batch_size": 1}, "--stage2.batch-size: got 1"),
        ("stage2", {"lr": float("inf")}, "--stage2.lr: got inf"),
        ("stage2", {"scl_crop": 0}, "--stage2.scl-crop: got 0"),
        ("decision", {"real_flagged_rate": 1.0}, "--real-flagged-rate: got 1.0"),
        ("stage1", {"warmup_epochs": 2}, "--stage1.warmup-epochs: got 2, wanted 0 or more, and fewer than .* 2"),
        ("stage2", {"encoder_lr_factor": 0.0}, "--stage2.encoder-lr-factor: got 0.0"),
        ("stage2", {"train_encoder_blocks": -1}, "--stage2.train-encoder-blocks: got -1"),
        ("cache", {"view_seed": -1}, "--view-seed: got -1"),
        ("augment", {"grey": 2.0}, "--grey: got 2.0"),
        ("augment", {"blur_share": 1.5}, r"--blur-share: got 1.5, wanted \[0, 1\]"),
        ("augment", {"blur_sigma": (2.0, 1.0)}, "--blur-sigma: got 2.0 1.0, wanted two values from 0 on, the smaller"),
        ("augment", {"jpeg_quality": (0, 90)}, "--jpeg-quality: got 0 90, wanted two values from 1 to 100"),
        ("augment", {"rescale_factor": (0.0, 1.0)}, "--rescale-factor: got 0.0 1.0, wanted two values from 0.01 on"),
        ("augment", {"noise_std": (0.0, float("inf"))}, "--noise-std: got 0.0 inf"),
    ],
)
def test_senseless_value_is_refused_by_option(part, change, message):
    config = preset_config("demo")
    changed = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})
    with pytest.raises(ConfigError, match=message):
        check_config(changed)


def test_paper_preset_without_data_says_what_to_pass():
    with pytest.raises(ConfigError, match=r"--data: got nothing.*pass --data DIR"):
        check_config(preset_config("paper"))
