"""The soft contrastive loss of a batch whose rows lie on several processes (gloo or NCCL)."""

from __future__ import annotations

import struct
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpp_ext.ops import DENOMINATORS, FORMS, Backend, resolve_backend, soft_contrastive_loss
from cpp_ext.reference import (
    FLOAT_TYPES,
    Denominator,
    Form,
    Reduction,
    check_label_values,
    check_soft_contrastive_inputs,
)

Gradient = Literal["averaged", "joint"]

_REDUCTIONS = ("mean", "sum", "none")
_GRADIENTS = ("averaged", "joint")
_IMPLEMENTATIONS = ("fused", "reference")
# What each rank tells the others before any tensor moves; all of it after the counts must agree.
_AGREED = (
    "width",
    "type of the embeddings",
    "type of the traces",
    "temperature",
    "eta",
    "form",
    "denominator",
    "reduction",
    "gradient",
    "implementation",
    "need of a gradient",
)


def gathered_soft_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    traces: Tensor,
    *,
    temperature: float,
    eta: float,
    form: Form = "log_sum",
    denominator: Denominator = "all",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
    gradient: Gradient = "averaged",
) -> Tensor:
    """Soft contrastive loss of the rows of all ranks together, the same value on each of them.

    Each rank passes its own rows; N and J may differ between ranks and may be 0. The joint batch holds the ranks' rows
    in the order of their ranks. Without a process group, or with one rank, this is `soft_contrastive_loss`.

    Args:
        embeddings: (N, C) rows of this rank; width and type agree between ranks. They are gathered with gradient.
        labels: (N,) int64, 0 real, 1 fake.
        traces: (J, C) natural traces of this rank's real images; detached.
        temperature, eta, form, denominator, backend: as in `soft_contrastive_loss`.
        reduction: "mean" or "sum" over the joint batch, or "none" for the losses of all its rows.
        group: the ranks that take part; None for all.
        gradient: what reaches this rank's rows when every rank calls backward on its loss.
            "averaged": world size times the gradient of the joint loss. DistributedDataParallel averages parameter
            gradients over ranks, and then gives exactly those of one process with the joint batch.
            "joint": the gradient of the joint loss itself, for those who sum parameter gradients over ranks.

    Raises:
        ValueError: input that does not make sense on some rank, or that differs between ranks; raised on every rank.
        BuildError: backend "fused" cannot run here.

    Note:
        Collective: every rank of the group calls it, and calls backward or not, as one. Each rank computes the whole
        loss, so time grows with the square of the joint batch. Before the loss it waits for a GPU to read two things
        back: whether the labels are 0 and 1, and, over NCCL, what the ranks tell each other. Collectives of GPU tensors
        over gloo wait too.
    """
    options: dict[str, Any] = {
        "temperature": temperature,
        "eta": eta,
        "form": form,
        "denominator": denominator,
        "reduction": reduction,
    }
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        _check_gradient(gradient)
        return soft_contrastive_loss(embeddings, labels, traces, backend=backend, **options)
    if dist.get_rank(group) < 0:
        raise ValueError("group must hold this process, got a group of others: call this on the group's ranks only")
    rows, traces_counts = _agree(embeddings, labels, traces, options, backend, gradient, group)
    scale = 1.0 if gradient == "averaged" else 1.0 / len(rows)
    joint_embeddings = _GatherRows.apply(embeddings, rows, group, scale)
    joint_labels = _gather(labels, rows, group)
    joint_traces = _gather(traces.detach(), traces_counts, group)
    return soft_contrastive_loss(joint_embeddings, joint_labels, joint_traces, backend=backend, **options)


def gather_rows(own: Tensor, counts: list[int], *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks in the order of their ranks, with gradient.

    Args:
        own: (n, ...) rows of this rank, n = counts[rank]; width and type agree between ranks.
        counts: rows of each rank, the same list on all of them.
        group: the ranks that take part; None for all.

    Returns:
        (sum of counts, ...). Where every rank computes the same loss from it and calls backward, this rank's rows get
        world size times its gradient, which DistributedDataParallel's averaging turns into the joint gradient.

    Note:
        Collective: every rank of the group calls it, and calls backward or not, as one.
    """
    gathered: Tensor = _GatherRows.apply(own, counts, group, 1.0)
    return gathered


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; backward sums the gradients that the ranks have for this rank's rows, times a scale."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: dist.ProcessGroup | None, scale: float) -> Tensor:
        ctx.counts, ctx.group, ctx.scale = counts, group, scale
        return _gather(own, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # Half precision would round the sum over ranks once more.
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        total = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        first = sum(ctx.counts[: dist.get_rank(ctx.group)])
        own = total[first : first + ctx.counts[dist.get_rank(ctx.group)]]
        return own.mul_(ctx.scale).to(gradient.dtype), None, None, None


def _gather(own: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in their order; `counts` says how many each has."""
    longest = max(counts)
    if longest == 0:
        return own.detach().clone()
    # Collectives want equal shapes, so each rank sends as many rows as the longest has.
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own.detach()
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded, group=group)
    return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])


def _agree(
    embeddings: Tensor,
    labels: Tensor,
    traces: Tensor,
    options: dict[str, Any],
    backend: str,
    gradient: str,
    group: dist.ProcessGroup | None,
) -> tuple[list[int], list[int]]:
    """Rows and traces of each rank, once all ranks know that all of them can go on.

    A rank with a problem must not leave before the others know of it: they would wait for it for ever.
    """
    problem: Exception | None = None
    facts = [0] * (3 + len(_AGREED))
    try:
        _check_gradient(gradient)
        _check_device(embeddings, group)
        check_soft_contrastive_inputs(embeddings, labels, traces, **options)
        check_label_values(labels)
        implementation = resolve_backend(backend, embeddings.device.type)
        agreed = _agreed_facts(embeddings, traces, options, gradient, implementation)
        facts = [1, len(embeddings), len(traces), *agreed]
    except Exception as error:
        problem = error
    told = _exchange(facts, group)
    if problem is not None:
        raise problem
    refused = [rank for rank, of_rank in enumerate(told) if not of_rank[0]]
    if refused:
        raise ValueError(
            f"the joint batch must make sense on every rank, got input that rank {refused[0]} refuses: see the error "
            "there"
        )
    for index, name in enumerate(_AGREED, 3):
        values = [of_rank[index] for of_rank in told]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            shown = f": {values[0]} and {values[other]}" if name == "width" else ""
            raise ValueError(
                f"the {name} must agree between ranks, got a difference between rank 0 and rank {other}{shown}: pass "
                "the same on every rank"
            )
    return [of_rank[1] for of_rank in told], [of_rank[2] for of_rank in told]


def _agreed_facts(
    embeddings: Tensor, traces: Tensor, options: dict[str, Any], gradient: str, implementation: str
) -> list[int]:
    """The values of `_AGREED` as integers."""
    return [
        embeddings.shape[1],
        FLOAT_TYPES.index(embeddings.dtype),
        FLOAT_TYPES.index(traces.dtype),
        _bits(options["temperature"]),
        _bits(options["eta"]),
        FORMS[options["form"]],
        DENOMINATORS[options["denominator"]],
        _REDUCTIONS.index(options["reduction"]),
        _GRADIENTS.index(gradient),
        _IMPLEMENTATIONS.index(implementation),
        int(torch.is_grad_enabled() and embeddings.requires_grad),
    ]


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _exchange(facts: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """`facts` of every rank."""
    # Not the embeddings' device: on the rank whose input is at fault it may be the wrong one.
    on_gpu = _moves_gpu_memory_only(group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    own = torch.tensor(facts, dtype=torch.int64, device=device)
    received = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, own, group=group)
    return [tensor.tolist() for tensor in received]


def _check_gradient(gradient: str) -> None:
    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(_GRADIENTS)}, got {gradient!r}: choose one of them")


def _check_device(embeddings: Tensor, group: dist.ProcessGroup | None) -> None:
    if _moves_gpu_memory_only(group) and embeddings.device.type != "cuda":
        raise ValueError(
            f"embeddings must be on a GPU for NCCL, got {embeddings.device}: move them, or make the group with gloo"
        )


def _moves_gpu_memory_only(group: dist.ProcessGroup | None) -> bool:
    return dist.get_backend(group) == dist.Backend.NCCL
