"""What a stage reports after an epoch: collapse is watched and said; and what its losses leave untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import TINY_ENCODER, tiny_config, write_pictures

from train.config import LossConfig, ModelConfig
from train.data import load_split
from train.encoder import Encoder
from train.errors import ConfigError
from train.model import NTFDetector, TraceModel
from train.stage import stage1_plan, stage2_plan
from train.stages import DetectorStage, TraceStage


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6})


def stage(data):
    torch.manual_seed(0)
    model = TraceModel(Encoder("test_resnet"), 16)
    return TraceStage(model, load_split(data, "train").records, tiny_config(data))


def test_stage_one_sees_real_pictures_only(data):
    assert [record.label for record in stage(data).records] == [0] * 6


def test_constant_homogeneous_features_are_reported_as_collapse(data):
    collapsed = stage(data)
    torch.nn.init.zeros_(collapsed.model.head_hom[2].weight)
    figures, warnings = collapsed.epoch_report()
    assert figures["hom_std"] == pytest.approx(0.0, abs=1e-6)
    assert figures["hom_effective_rank"] == pytest.approx(1.0, abs=0.01)
    assert len(warnings) == 1
    assert "close to one constant vector" in warnings[0]


def test_spread_features_are_not(data, monkeypatch):
    spread = stage(data)
    rows = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    monkeypatch.setattr(spread.model.head_hom, "forward", lambda embeddings: rows)
    figures, warnings = spread.epoch_report()
    assert figures["hom_effective_rank"] > 4
    assert warnings == []


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_the_contrastive_loss_nothing_trains_a_projection_that_the_classifier_does_not_read(data, weight):
    config = tiny_config(
        data, model=ModelConfig(TINY_ENCODER, "none", 16, "encoder"), loss=LossConfig(scl_weight=weight)
    )
    records = load_split(data, "train").records
    torch.manual_seed(0)
    detector = NTFDetector(Encoder(TINY_ENCODER), 16, "encoder")
    trained = DetectorStage(detector, records, config, records, "reference")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    optimizer = torch.optim.SGD(trained.trainable(), lr=0.1, weight_decay=0.1)
    trained.set_train_mode()
    losses = trained.losses(next(trained.batches(0, 0)), 6)
    losses["loss"].backward()
    optimizer.step()
    changed = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "classifier.bias"} <= changed
    assert ("projection.0.weight" in changed) == (weight > 0)
    assert ("contrastive" in losses) == (weight > 0)
    if not weight:
        assert changed == {"classifier.weight", "classifier.bias"}
        assert losses["loss"] == config.loss.gamma * losses["classification"]


def test_without_its_losses_nothing_trains_the_heterogeneous_head(data):
    torch.manual_seed(0)
    model = TraceModel(Encoder(TINY_ENCODER), 16)
    records = load_split(data, "train").records
    bare = TraceStage(model, records, tiny_config(data, loss=LossConfig(lambda_het=0.0, lambda_orth=0.0)))
    bare.losses(next(bare.batches(0, 0)), 4)["loss"].backward()
    assert not any(p.grad.any() for p in model.head_het.parameters() if p.grad is not None)
    assert model.head_hom[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("option", ["--crop", "--stage2.scl-crop"])
def test_crop_of_a_vit_is_its_input_size(data, option):
    config = tiny_config(data, encoder="test_vit")
    if option == "--crop":
        stage2 = replace(config.stage2, scl_crop=160)
        config = replace(config, augment=replace(config.augment, crop=96), stage2=stage2)
    detector = NTFDetector(Encoder("test_vit"), 16, "projection")
    with pytest.raises(ConfigError, match=rf"{option}: got \d+ with test_vit, whose input size is fixed, wanted 160"):
        DetectorStage(detector, load_split(data, "train").records, config, [], "reference")


def test_crop_is_the_size_of_both_views_of_stage_one_and_of_the_classifiers(data):
    config = tiny_config(data)
    config = replace(config, augment=replace(config.augment, crop=96))
    assert (stage1_plan(config, (160, 160)).first, stage1_plan(config, (160, 160)).second) == ((96, 96), (96, 96))
    assert (stage2_plan(config, (160, 160)).first, stage2_plan(config, (160, 160)).second) == ((96, 96), (32, 32))
    assert stage2_plan(tiny_config(data), (160, 160)).first == (160, 160)
