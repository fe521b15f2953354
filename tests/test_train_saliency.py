"""Grad-CAM++ beside the evidence: which pictures, which maps, which figures, and a detector that stays as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from training import TINY_ENCODER, write_pictures

from runtime.manifest import CalibrationSpec
from runtime.strict_json import from_jsonable, to_jsonable
from train.data import load_split
from train.encoder import Encoder
from train.errors import ConfigError
from train.loading import prepared_loader
from train.model import NTFDetector, freeze_natural_traces
from train.pictures import PictureRecord
from train.saliency import (
    LAST_MAP,
    Chosen,
    SaliencyPicture,
    SaliencySheet,
    chosen_pictures,
    rank_correlation,
    saliency_layer,
    saliency_maps,
    saliency_pictures,
    saliency_report,
    saliency_section,
)
from train.saliency_sheet import evidence_limit, write_sheet
from train.scoring import preprocess_spec

SPEC = CalibrationSpec(2.0, 0.25, -1.0, 1.0, 0.01, 0.05)
ENCODERS = [TINY_ENCODER, "test_vit"]
EPSILON = 1e-6  # grad-cam's, below a fraction


def detector_of(encoder: str, depths: Sequence[int] = ()) -> NTFDetector:
    torch.manual_seed(0)
    return freeze_natural_traces(NTFDetector(Encoder(encoder, depths=depths), 16, "both")).eval()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureRecord, ...]:
    return load_split(write_pictures(tmp_path_factory.mktemp("saliency"), counts={"test": 2}), "test").records


def record_of(label: int, generator: str = "sd") -> PictureRecord:
    return PictureRecord(Path("/x.png"), label, generator, generator, "x", "test")


def expected_gradcam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """Eqs. (7), (10) and (19) of Chattopadhay et al. 2018, written for one map (h, w, d), scaled to 0..1."""
    height, width, depth = activations.shape
    cam = torch.zeros(height, width)
    for k in range(depth):
        a, g = activations[..., k], gradients[..., k]
        alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum() * g**3 + EPSILON), 0.0)
        cam += (alpha * g.clamp(min=0)).sum() * a
    cam = cam.clamp(min=0)
    return ((cam - cam.min()) / (cam.max() - cam.min())).numpy()


def cell_features(detector: NTFDetector, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and gradients of the logit, each (N, h, w, d), cell by cell."""
    net, kept = detector.encoder.net, []
    pixels = detector.normalizer(images).requires_grad_()
    if hasattr(net, "blocks"):
        handle = net.blocks[-1].norm1.register_forward_hook(lambda module, args, output: kept.append(output))
        embeddings = detector.encoder.embed(pixels)
        handle.remove()
    else:
        kept.append(net.forward_features(pixels))
        _, depths = detector.encoder.features(pixels)
        embeddings = torch.cat([net.forward_head(kept[0], pre_logits=True), *(part.pooled for part in depths)], dim=1)
    logit = detector.classify(embeddings, detector.projection(embeddings)).sum()
    (gradient,) = torch.autograd.grad(logit, kept[0])
    if kept[0].ndim == 4:
        return kept[0].permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    rows, columns = net.patch_embed.grid_size
    tokens = [[net.num_prefix_tokens + r * columns + c for c in range(columns)] for r in range(rows)]
    return kept[0][:, tokens], gradient[:, tokens]


@pytest.mark.parametrize("depths", [[], [1]])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_maps_are_gradcam_and_the_detectors_own_evidence(
    encoder: str, depths: list[int], records: tuple[PictureRecord, ...]
) -> None:
    detector = detector_of(encoder, depths)
    (images,) = prepared_loader(records, preprocess_spec(detector.encoder), batch_size=len(records))
    maps = saliency_maps(detector, records, batch_size=3)
    np.testing.assert_array_equal(maps.images, images)
    with torch.inference_mode():
        np.testing.assert_allclose(maps.evidence, detector(images).evidence, rtol=1e-4, atol=1e-5)
    activations, gradients = cell_features(detector, images)
    for number in range(len(records)):
        expected = expected_gradcam(activations[number].detach(), gradients[number])
        assert np.ptp(expected) == 1.0
        np.testing.assert_allclose(maps.gradcam[number], expected, atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_detector_is_left_as_it_was(encoder: str, records: tuple[PictureRecord, ...]) -> None:
    detector = detector_of(encoder)
    detector.projection.train()
    parameter = detector.classifier.weight
    parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    flags = [p.requires_grad for p in detector.parameters()]
    modes = [m.training for m in detector.modules()]
    saliency_maps(detector, records)
    assert [p.requires_grad for p in detector.parameters()] == flags
    assert True in flags
    assert False in flags
    assert [m.training for m in detector.modules()] == modes
    assert [p.grad is not None for p in detector.parameters()].count(True) == 1
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert not any(m._forward_hooks for m in detector.modules())


def test_transformer_of_another_build_is_refused() -> None:
    net = SimpleNamespace(num_prefix_tokens=1, blocks=[SimpleNamespace()])
    with pytest.raises(ConfigError, match=r"--gradcam with encoder odd: got a transformer without blocks\[-1\].norm1"):
        saliency_layer(SimpleNamespace(net=net, name="odd", reads="rgb"))


def test_encoder_that_reads_a_picture_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gradcam with --encoder-input both: got two last maps of each picture"):
        saliency_layer(Encoder("test_resnet", reads="both"))
    assert saliency_layer(Encoder("test_resnet", reads="residual")) == LAST_MAP


def test_worst_mistakes_take_up_to_half_and_the_surest_right_ones_the_rest() -> None:
    # fake above 1, so real pictures above are flagged and fakes up to 1 are missed
    real, fake = [-5.0, -4.0, 0.5, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0, 0.0]
    logits = np.array(real + fake, np.float32)
    records = [record_of(0)] * 5 + [record_of(1)] * 5
    assert chosen_pictures(records, logits, SPEC, 4) == [
        Chosen(0, "right"),
        Chosen(1, "right"),
        Chosen(3, "mistake"),
        Chosen(4, "mistake"),
        Chosen(5, "right"),
        Chosen(6, "right"),
        Chosen(7, "right"),
        Chosen(9, "mistake"),
    ]
    assert chosen_pictures(records, logits, SPEC, 1) == [Chosen(0, "right"), Chosen(5, "right")]


def test_each_generator_has_its_own_pictures_and_mistakes_fill_up_where_nothing_is_right() -> None:
    records = [record_of(1, "b"), record_of(1, "a"), record_of(1, "b"), record_of(0, "a")]
    logits = np.array([0.5, 4.0, -3.0, -2.0], np.float32)
    assert chosen_pictures(records, logits, SPEC, 3) == [
        Chosen(3, "right"),
        Chosen(1, "right"),
        Chosen(2, "mistake"),
        Chosen(0, "mistake"),
    ]


@pytest.mark.parametrize(
    ("second", "expected"),
    [([[10, 20], [30, 99]], 1.0), ([[4, 3], [2, 1]], -1.0), ([[1, 1], [1, 1]], None)],
)
def test_correlation_is_of_ranks_and_not_defined_for_a_flat_map(
    second: list[list[float]], expected: float | None
) -> None:
    found = rank_correlation(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array(second, float))
    assert found is None if expected is None else found == pytest.approx(expected)


def picture(label: int, choice: str, correlation: float | None, generator: str = "sd") -> SaliencyPicture:
    evidence = ((-1.0, 0.5), (2.0, -4.0))
    return SaliencyPicture("x", generator, label, choice, "fake", 0.9, ((0.0, 1.0), (0.5, 0.2)), evidence, correlation)


def test_report_counts_right_and_wrong_and_leaves_undefined_ones_out_of_the_mean() -> None:
    pictures = [picture(0, "right", 0.5), picture(0, "right", None), picture(1, "mistake", -0.5)]
    report = saliency_report(pictures, layer="the last feature map", pictures_per_class=3)
    assert [(s.name, s.pictures, s.defined, s.mean, s.minimum, s.maximum) for s in report.sets] == [
        ("real, not called fake", 2, 1, 0.5, 0.5, 0.5),
        ("real, called fake", 0, 0, None, None, None),
        ("fake, called fake", 0, 0, None, None, None),
        ("fake, not called fake", 1, 1, -0.5, -0.5, -0.5),
        ("all", 3, 2, 0.0, -0.5, 0.5),
    ]
    text = saliency_section(report)
    assert "| all | 3 | 2 | 0.00 | -0.50 | 0.50 |" in text
    assert "(taken from the last feature map)" in text
    assert "At most 3 pictures of each class" in text


def test_pictures_carry_verdict_probability_and_calibrated_evidence(records: tuple[PictureRecord, ...]) -> None:
    maps = saliency_maps(detector_of(TINY_ENCODER), records[1:2])
    logits = np.array([0.0, 3.5, 0.0, 0.0], np.float32)
    (shown,) = saliency_pictures([Chosen(1, "mistake")], records, list("abcd"), logits, SPEC, maps)
    assert (shown.id, shown.choice, shown.verdict) == ("b", "mistake", "fake")
    assert shown.fake_probability == pytest.approx(1 / (1 + np.exp(-(3.5 / 2 + 0.25))))
    np.testing.assert_allclose(shown.evidence, maps.evidence[0] / 2 + 0.25, rtol=1e-5)
    sheet = SaliencySheet(saliency_report([shown], layer="x", pictures_per_class=1), (shown,))
    assert from_jsonable(SaliencySheet, json.loads(json.dumps(to_jsonable(sheet)))) == sheet


def test_sheet_has_a_line_for_three_pictures_and_shows_names_as_they_are(tmp_path: Path) -> None:
    long = "_$x^2$ of a very long name indeed"
    pictures = [picture(0, "right", 0.5)] * 4 + [picture(1, "mistake", None, name) for name in (long, long + "2")]
    images = np.full((6, 8, 8, 3), 90, np.uint8)
    write_sheet(tmp_path / "six.png", pictures, images)
    write_sheet(tmp_path / "one.png", pictures[:1], images[:1])
    with Image.open(tmp_path / "six.png") as six, Image.open(tmp_path / "one.png") as one:
        assert six.width == one.width
        assert six.height - one.height == pytest.approx(3 * 154, abs=1)
        assert len(six.convert("RGB").getcolors(1 << 24)) > 100


def test_evidence_has_one_scale_that_a_single_cell_does_not_set() -> None:
    calm = picture(0, "right", 0.5)
    assert 2.0 < evidence_limit([calm]) <= 4.0
    wild = replace(calm, evidence=((1000.0, 0.5), (2.0, -4.0)))
    assert evidence_limit([wild, *[calm] * 30]) == 4.0
    assert evidence_limit([replace(calm, evidence=((0.0, 0.0), (0.0, 0.0)))]) == 1.0
