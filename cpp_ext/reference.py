"""The soft contrastive loss in plain PyTorch, written to be read: the oracle of every faster version."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Form = Literal["log_sum", "log_mean", "literal"]
Denominator = Literal["all", "negatives"]
Reduction = Literal["mean", "sum", "none"]
_ALLOWED = {
    "form": ("log_sum", "log_mean", "literal"),
    "denominator": ("all", "negatives"),
    "reduction": ("mean", "sum", "none"),
}

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def soft_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    traces: Tensor,
    *,
    temperature: float,
    eta: float,
    form: Form = "log_sum",
    denominator: Denominator = "all",
    reduction: Reduction = "mean",
    trace_gradient: bool = False,
) -> Tensor:
    """Soft contrastive loss, Eq. (5) of Liang et al. 2024 (arXiv:2403.16513).

    With s_ik = z_i . z_k / temperature, t_ij = z_i . h_j / temperature, y_i = +1 for a real and -1 for a fake
    anchor, and L_i = logsumexp over K(i) of s_ik, the loss of anchor i is

        log_sum    L_i - mean_P s_ip - logsumexp_j (y_i eta t_ij)
        log_mean   L_i - mean_P s_ip - y_i eta mean_j t_ij
        literal    -(1/J) exp(logsumexp_P s_ip - log |P| + logsumexp_j (y_i eta t_ij) - L_i)

    P(i) are the other rows with i's label. An anchor whose P, K or J is empty contributes 0, and no gradient.

    Args:
        embeddings: z, (N, C) float16, bfloat16, float32 or float64; rows are taken as they are, so normalise them
            first. Half precision is computed in float32.
        labels: (N,) int64, 0 real, 1 fake.
        traces: h, (J, C), the homogeneous features of the real images; J need not be the number of real rows.
        temperature: tau, above 0.
        eta: weight of the traces, any finite number.
        form: which reading of Eq. (5).
        denominator: "all" for K(i) = all other rows, "negatives" for the rows of the other label.
        reduction: "mean" over all N rows, "sum", or "none" for one loss per row.
        trace_gradient: let the gradient flow to the traces; the paper detaches them.

    Returns:
        Scalar, or (N,) with reduction "none"; float32, or float64 for float64 embeddings. The mean of no rows is 0.

    Raises:
        ValueError: shapes, types or values that do not make sense.

    Note:
        Allocates a few N x N and N x J arrays: memory grows with the square of N.
    """
    check_soft_contrastive_inputs(embeddings, labels, traces, temperature, eta, form, denominator, reduction)
    check_label_values(labels)
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings.to(wide)
        h = (traces if trace_gradient else traces.detach()).to(wide)
        per_row = _loss_per_row(z, labels, h, temperature, eta, form, denominator)
    return reduce_rows(per_row, reduction)


def reduce_rows(per_row: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum of the losses (N,), or the losses as they are; the mean of no rows is 0."""
    if reduction == "none":
        return per_row
    return per_row.mean() if reduction == "mean" and len(per_row) else per_row.sum()


def _loss_per_row(
    z: Tensor, labels: Tensor, h: Tensor, temperature: float, eta: float, form: Form, denominator: Denominator
) -> Tensor:
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    same = labels[:, None] == labels[None, :]
    positives = same & others
    keys = others if denominator == "all" else ~same
    anchors = torch.nonzero(positives.any(1) & keys.any(1) & (len(h) > 0)).squeeze(1)

    # From here on rows are anchors only, so that no logsumexp runs over an empty set.
    s = z[anchors] @ z.T / temperature
    t = z[anchors] @ h.T / temperature
    positives, keys = positives[anchors], keys[anchors]
    sign = 1 - 2 * labels[anchors].to(z.dtype)  # y: +1 real, -1 fake
    pull = (sign * eta)[:, None] * t
    log_all = _masked_logsumexp(s, keys)
    if form == "literal":
        log_positive = _masked_logsumexp(s, positives) - positives.sum(1).to(z.dtype).log()
        rows = -(log_positive + torch.logsumexp(pull, 1) - log_all).exp() / max(len(h), 1)
    else:
        mean_positive = torch.where(positives, s, 0).sum(1) / positives.sum(1)
        traces_term = torch.logsumexp(pull, 1) if form == "log_sum" else pull.mean(1)
        rows = log_all - mean_positive - traces_term
    return torch.zeros(len(z), dtype=z.dtype, device=z.device).index_put((anchors,), rows)


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    return torch.logsumexp(values.masked_fill(~mask, float("-inf")), 1)


def check_soft_contrastive_inputs(
    embeddings: Tensor,
    labels: Tensor,
    traces: Tensor,
    temperature: float,
    eta: float,
    form: str,
    denominator: str,
    reduction: str,
) -> None:
    """Refuse inputs on which the loss is not defined; reads shapes and types, never the tensors' values.

    Raises:
        ValueError: saying what was given, what was wanted and what to do.
    """
    if embeddings.ndim != 2 or embeddings.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"embeddings must be floating point (N, C), got {_of(embeddings)}: pass projected, normalised rows"
        )
    if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 ({len(embeddings)},), one for each row, got {_of(labels)}: use labels.long()"
        )
    if traces.ndim != 2 or traces.shape[1] != embeddings.shape[1] or traces.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"traces must be floating point (J, {embeddings.shape[1]}), got {_of(traces)}: "
            "project them with the same width as the embeddings"
        )
    if labels.device != embeddings.device or traces.device != embeddings.device:
        raise ValueError(
            "embeddings, labels and traces must be on one device, got "
            f"{embeddings.device}, {labels.device} and {traces.device}: move them with .to(embeddings.device)"
        )
    for name, number in (("temperature", temperature), ("eta", eta)):
        if isinstance(number, Tensor):
            raise ValueError(f"{name} must be a number, got a tensor, which would get no gradient: pass {name}.item()")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: the usual value is 0.07")
    if not (temperature < math.inf and -math.inf < eta < math.inf):
        raise ValueError(f"temperature and eta must be finite, got {temperature} and {eta}: pass ordinary numbers")
    for name, value in (("form", form), ("denominator", denominator), ("reduction", reduction)):
        if value not in _ALLOWED[name]:
            raise ValueError(f"{name} must be one of {', '.join(_ALLOWED[name])}, got {value!r}: choose one of them")


def check_label_values(labels: Tensor) -> None:
    """Refuse labels other than 0 and 1; waits for a GPU.

    Raises:
        ValueError: naming the first other label.
    """
    wrong = (labels != 0) & (labels != 1)
    if bool(wrong.any()):
        raise ValueError(f"labels must be 0 (real) or 1 (fake), got [{labels[wrong][0].item()}]: map them first")


def _of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
