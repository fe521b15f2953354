"""What a stage reports after an epoch: collapse is watched and said."""

from __future__ import annotations

import pytest
import torch
from training import tiny_config, write_pictures

from train.data import load_split
from train.encoder import Encoder
from train.model import TraceModel
from train.stages import TraceStage


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
