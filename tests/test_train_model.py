"""The detector's graph contract and what stage 2 may change of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import tiny_config, write_pictures

from train.checkpoint import load_detector
from train.encoder import Encoder
from train.model import NTFDetector, PixelNormalizer, TraceModel, detector_from_traces, freeze_natural_traces
from train.run import train


def detector(kind="projection", encoder="test_resnet"):
    torch.manual_seed(0)
    model = NTFDetector(Encoder(encoder), 128, kind)
    model.mean_trace.copy_(torch.randn(128))
    return model.eval()


def images(n=3, side=160):
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["projection", "encoder", "both"])
@pytest.mark.parametrize("encoder", ["test_resnet", "test_vit"])
def test_outputs_follow_the_graph_contract(kind, encoder):
    with torch.inference_mode():
        output = detector(kind, encoder)(images())
    assert output.logits.shape == output.trace_similarity.shape == (3,)
    assert output.embeddings.shape == (3, 128)
    assert output.evidence.ndim == 3
    assert all(value.dtype == torch.float32 for value in output)
    torch.testing.assert_close(output.embeddings.norm(dim=1), torch.ones(3))
    assert bool((output.trace_similarity.abs() <= 1).all())


def test_score_does_not_depend_on_the_batch():
    model, batch = detector(), images(5)
    with torch.inference_mode():
        together = model(batch)
        alone = [model(batch[i : i + 1]) for i in range(5)]
    for index, single in enumerate(alone):
        torch.testing.assert_close(single.logits[0], together.logits[index], rtol=1e-5, atol=1e-5)


def test_evidence_of_a_uniform_picture_equals_its_logit():
    # Every cell sees the same values (but at the border, where padding shows), so the head says the same of each.
    model = detector()
    with torch.inference_mode():
        cells = model.encoder(model.normalizer(images(1)))
        row = cells.pooled
        alike = cells.cells.new_zeros(cells.cells.shape) + row[:, None, None]
        logit = model.classify(row, model.projection(row))
        evidence = model.classify(alike, model.projection(alike))
    torch.testing.assert_close(evidence, logit[:, None, None].expand_as(evidence))


def test_normalizer_equals_the_usual_formula():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given = images(2, side=8)
    expected = (given.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    found = PixelNormalizer(mean, std)(given)
    torch.testing.assert_close(found.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_stage_two_takes_over_encoder_and_homogeneous_head_frozen():
    torch.manual_seed(0)
    traces = TraceModel(Encoder("test_resnet"), 16)
    model = detector_from_traces(traces, 16, "projection")
    assert model.encoder is traces.encoder
    assert model.head_hom is traces.head_hom
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.startswith(("projection", "classifier"))}


def test_frozen_batch_norm_keeps_its_statistics_in_train_mode():
    model = freeze_natural_traces(detector().train())
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model.embed(images())
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_head_width_is_that_of_every_head_and_survives_a_checkpoint(tmp_path):
    data = write_pictures(tmp_path / "data", counts={"train": 4, "val": 10})
    config = tiny_config(data)
    config = replace(config, model=replace(config.model, head_width=24))
    (tmp_path / "run").mkdir()
    trained = train(config, tmp_path / "run")
    loaded = load_detector(tmp_path / "run")
    for detector in (trained, loaded):
        assert [head[0].out_features for head in (detector.head_hom, detector.projection)] == [24, 24]
    assert torch.equal(loaded.projection[2].weight, trained.projection[2].weight)
