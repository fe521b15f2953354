"""The losses of both stages, Eqs. (1) to (7) of Liang et al. 2024 (arXiv:2403.16513)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HomReduction = Literal["max", "topk", "mean"]
Orthogonality = Literal["square", "cos", "abs"]


class TraceLoss(NamedTuple):
    """Stage 1: the total of Eq. (4) and its terms, scalars."""

    total: Tensor
    homogeneous: Tensor
    heterogeneous: Tensor
    orthogonality: Tensor


class DetectorLoss(NamedTuple):
    """Stage 2: the total of Eq. (7) and its terms, scalars; None for a contrastive loss that was left out."""

    total: Tensor
    contrastive: Tensor | None
    classification: Tensor


def info_nce_loss(z_het: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE over two views of each image, Eq. (1), mean over anchors.

    Args:
        z_het: (2B, C) unit rows; row i and row i + B are views of the same image.
        temperature: tau, above 0.

    Returns:
        Scalar; K(i) is every other row.
    """
    n = len(z_het)
    similarity = z_het @ z_het.T / temperature
    similarity = similarity.masked_fill(torch.eye(n, dtype=torch.bool, device=z_het.device), float("-inf"))
    partner = torch.arange(n, device=z_het.device).roll(n // 2)
    return F.cross_entropy(similarity, partner)


def homogeneous_loss(z_hom: Tensor, *, reduction: HomReduction, topk: int) -> Tensor:
    """Squared distance between the homogeneous rows of different images, Eq. (2).

    Args:
        z_hom: (2B, C) unit rows; row i and row i + B are views of the same image.
        reduction: "max" takes the largest distance of the batch (the paper), "topk" the mean of the `topk` largest,
            "mean" the mean over all pairs of different images.
        topk: number of pairs for "topk"; all pairs where there are fewer.

    Returns:
        Scalar; 0 with a zero gradient when the batch holds fewer than two images.
    """
    n = len(z_hom)
    source = torch.arange(n, device=z_hom.device) % (n // 2)
    first, second = torch.triu_indices(n, n, offset=1, device=z_hom.device)
    different = source[first] != source[second]
    first, second = first[different], second[different]
    if len(first) == 0:
        return (z_hom * 0).sum()
    distance = 2 - 2 * (z_hom @ z_hom.T)[first, second]  # rows have unit length
    if reduction == "max":
        return distance.max()
    if reduction == "topk":
        return distance.topk(min(topk, len(distance))).values.mean()
    return distance.mean()


def orthogonality_loss(z_hom: Tensor, z_het: Tensor, *, kind: Orthogonality) -> Tensor:
    """Soft orthogonality of the two heads' rows of the same view, Eq. (3), mean over rows.

    Args:
        z_hom: (R, C) unit rows.
        z_het: (R, C) unit rows.
        kind: "square" for cos^2, whose minimum is orthogonality; "cos" as printed, whose minimum is -1; "abs".
    """
    cosine = (z_hom * z_het).sum(1)
    if kind == "square":
        return cosine.square().mean()
    return cosine.abs().mean() if kind == "abs" else cosine.mean()


def natural_trace_loss(
    z_hom: Tensor,
    z_het: Tensor,
    *,
    temperature: float,
    lambda_orth: float,
    hom_reduction: HomReduction,
    hom_topk: int,
    orth: Orthogonality,
    lambda_het: float = 1.0,
) -> TraceLoss:
    """Natural trace representation loss L_hom + L_het + lambda L_orth, Eq. (4); arguments as in its terms.

    A term of weight 0 is reported and has no part in the total, so that it has no gradient whatever its value.
    """
    homogeneous = homogeneous_loss(z_hom, reduction=hom_reduction, topk=hom_topk)
    heterogeneous = info_nce_loss(z_het, temperature=temperature)
    orthogonality = orthogonality_loss(z_hom, z_het, kind=orth)
    total = homogeneous
    for weight, term in ((lambda_het, heterogeneous), (lambda_orth, orthogonality)):
        total = total + weight * term if weight else total
    return TraceLoss(total, homogeneous, heterogeneous, orthogonality)


def cross_entropy(logits: Tensor, labels: Tensor, *, balanced: bool = False) -> Tensor:
    """Binary cross entropy, Eq. (6), mean over rows.

    Args:
        logits: (N,) float, larger means more likely fake.
        labels: (N,) int64, 0 real, 1 fake.
        balanced: the mean over the classes of their means instead, so that the rarer one counts as much.
    """
    targets = labels.to(logits.dtype)
    if not balanced:
        return F.binary_cross_entropy_with_logits(logits, targets)
    counts = labels.bincount(minlength=2)
    weights = len(labels) / ((counts > 0).sum() * counts.clamp_min(1))[labels]
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weights.to(logits.dtype))


def detector_loss(
    contrastive: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    scl_weight: float = 1.0,
    balanced: bool = False,
) -> DetectorLoss:
    """Discriminative loss L_scl + gamma L_ce, Eqs. (6) and (7).

    Args:
        contrastive: scalar, the mean soft contrastive loss of the batch; None leaves it out.
        logits: (N,) float, larger means more likely fake.
        labels: (N,) int64, 0 real, 1 fake.
        gamma: weight of the cross entropy.
        scl_weight: weight of the contrastive loss.
        balanced: as in `cross_entropy`.
    """
    classification = cross_entropy(logits, labels, balanced=balanced)
    total = gamma * classification
    if contrastive is not None:
        total = scl_weight * contrastive + total
    return DetectorLoss(total, contrastive, classification)


class Spread(NamedTuple):
    """How far the rows of a batch are from being one and the same vector."""

    std: float  # mean over dimensions of the standard deviation over rows; 1 / sqrt(C) for rows all over the sphere
    effective_rank: float  # exp of the entropy of the normalised singular values; 1 for a single direction


def spread_of(rows: Tensor) -> Spread:
    """Standard deviation and effective rank (Roy and Vetterli 2007) of (R, C) rows, R at least 2."""
    singular = torch.linalg.svdvals(rows.detach().float())
    share = singular / singular.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return Spread(std=rows.detach().float().std(0).mean().item(), effective_rank=entropy.exp().item())
