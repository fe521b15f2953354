"""Eqs. (1) to (7) on batches small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from train.losses import (
    cross_entropy,
    detector_loss,
    homogeneous_loss,
    info_nce_loss,
    natural_trace_loss,
    orthogonality_loss,
    spread_of,
)

E = torch.eye(4, dtype=torch.float64)


def test_info_nce_of_two_images_by_hand():
    # Views: image A -> e0, e0; image B -> e1, e1. Each anchor: partner at cosine 1, the two others at cosine 0.
    z = torch.stack((E[0], E[1], E[0], E[1]))
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert info_nce_loss(z, temperature=0.5).item() == pytest.approx(expected)


def test_info_nce_equals_a_loop_over_anchors():
    z = torch.nn.functional.normalize(torch.randn(10, 6, dtype=torch.float64, generator=torch.manual_seed(0)), dim=1)
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        keys = [math.exp(float(z[i] @ z[k]) / 0.2) for k in range(10) if k != i]
        total -= math.log(math.exp(float(z[i] @ z[partner]) / 0.2) / sum(keys))
    assert info_nce_loss(z, temperature=0.2).item() == pytest.approx(total / 10)


@pytest.mark.parametrize(("reduction", "expected"), [("max", 4.0), ("topk", 10 / 3), ("mean", 3.0)])
def test_homogeneous_loss_by_hand(reduction, expected):
    # A -> e0, e0; B -> e1, -e0. The pairs of different images lie at squared distances 2, 4, 2, 4.
    z = torch.stack((E[0], E[1], E[0], -E[0]))
    assert homogeneous_loss(z, reduction=reduction, topk=3).item() == pytest.approx(expected)


def test_homogeneous_loss_ignores_the_two_views_of_one_image():
    z = torch.stack((E[0], -E[0])).requires_grad_()  # one image whose views are opposite
    loss = homogeneous_loss(z, reduction="max", topk=1)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_only_the_farthest_pair_gets_a_gradient_with_max():
    z = torch.nn.functional.normalize(torch.randn(8, 5, generator=torch.manual_seed(1)), dim=1).requires_grad_()
    homogeneous_loss(z, reduction="max", topk=1).backward()
    assert int((z.grad.abs().sum(1) > 0).sum()) == 2


@pytest.mark.parametrize(("kind", "expected"), [("square", 0.5), ("cos", 0.0), ("abs", 1.0 / math.sqrt(2))])
def test_orthogonality_by_hand(kind, expected):
    diagonal = (E[0] + E[1]) / math.sqrt(2)
    z_hom, z_het = torch.stack((E[0], E[0])), torch.stack((diagonal, -diagonal))
    assert orthogonality_loss(z_hom, z_het, kind=kind).item() == pytest.approx(expected)


def test_square_has_its_minimum_at_orthogonality_and_cos_does_not():
    hom = E[:1]
    at = {name: torch.stack((row,)) for name, row in (("orthogonal", E[1]), ("opposite", -E[0]))}
    assert orthogonality_loss(hom, at["orthogonal"], kind="square") < orthogonality_loss(
        hom, at["opposite"], kind="square"
    )
    assert orthogonality_loss(hom, at["opposite"], kind="cos") < orthogonality_loss(hom, at["orthogonal"], kind="cos")


def test_natural_trace_loss_adds_its_terms():
    generator = torch.manual_seed(2)
    rows = [torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2)]
    loss = natural_trace_loss(*rows, temperature=0.1, lambda_orth=0.3, hom_reduction="mean", hom_topk=1, orth="square")
    parts = (
        homogeneous_loss(rows[0], reduction="mean", topk=1)
        + info_nce_loss(rows[1], temperature=0.1)
        + 0.3 * orthogonality_loss(*rows, kind="square")
    )
    torch.testing.assert_close(loss.total, parts)


def test_detector_loss_counts_fake_as_one_and_weights_the_cross_entropy():
    logits, labels = torch.tensor([2.0, -1.0]), torch.tensor([1, 0])
    loss = detector_loss(torch.tensor(3.0), logits, labels, gamma=0.5)
    cross_entropy = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0))) / 2
    assert loss.classification.item() == pytest.approx(cross_entropy)
    assert loss.total.item() == pytest.approx(3.0 + 0.5 * cross_entropy)


def test_balanced_cross_entropy_is_the_mean_of_the_classes_means():
    logits, labels = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([1, 0, 0, 0])
    fake = math.log1p(math.exp(-2.0))
    real = sum(math.log1p(math.exp(logit)) for logit in (-1.0, 0.5, 3.0)) / 3
    assert cross_entropy(logits, labels).item() == pytest.approx((fake + 3 * real) / 4)
    assert cross_entropy(logits, labels, balanced=True).item() == pytest.approx((fake + real) / 2)
    assert cross_entropy(logits[1:], labels[1:], balanced=True).item() == pytest.approx(real)
    loss = detector_loss(torch.tensor(3.0), logits, labels, gamma=0.5, balanced=True)
    assert loss.total.item() == pytest.approx(3.0 + 0.5 * (fake + real) / 2)


def test_spread_tells_one_point_from_all_directions():
    collapsed = spread_of(torch.ones(64, 16) / 4)
    generator = torch.manual_seed(3)
    uniform = spread_of(torch.nn.functional.normalize(torch.randn(512, 16, generator=generator), dim=1))
    assert collapsed.std == pytest.approx(0.0, abs=1e-6)
    assert collapsed.effective_rank == pytest.approx(1.0, abs=1e-3)
    assert uniform.std == pytest.approx(1 / 4, rel=0.05)
    assert uniform.effective_rank > 15


def test_term_of_weight_zero_has_no_part_in_the_total_whatever_its_value():
    hom = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.manual_seed(2)), dim=1).requires_grad_()
    het = torch.full((6, 4), float("nan"), requires_grad=True)
    loss = natural_trace_loss(
        hom, het, temperature=0.1, lambda_het=0.0, lambda_orth=0.0, hom_reduction="mean", hom_topk=1, orth="square"
    )
    assert loss.total == homogeneous_loss(hom, reduction="mean", topk=1)
    assert loss.heterogeneous.isnan()
    loss.total.backward()
    assert het.grad is None
    assert hom.grad.isfinite().all()


def test_weights_of_both_stages_scale_their_terms():
    rows = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=torch.manual_seed(4)), dim=2)
    options = {"temperature": 0.1, "lambda_orth": 0.0, "hom_reduction": "mean", "hom_topk": 1, "orth": "square"}
    whole, half = (natural_trace_loss(*rows, lambda_het=weight, **options) for weight in (1.0, 0.5))
    assert (whole.total - half.total).item() == pytest.approx(0.5 * whole.heterogeneous.item(), rel=1e-5)
    logits, labels = torch.tensor([2.0, -1.0]), torch.tensor([1, 0])
    scaled = detector_loss(torch.tensor(3.0), logits, labels, gamma=0.5, scl_weight=0.25)
    alone = detector_loss(None, logits, labels, gamma=0.5)
    assert alone.contrastive is None
    assert scaled.total.item() == pytest.approx(0.75 + alone.total.item())
