"""Who is timed on the soft contrastive loss, on which inputs, and how a result is judged before it is timed.

Two contests, because the peer, SupConLoss of pytorch-metric-learning, has no natural traces:

    with traces      form log_sum, J = N / 2 traces: straightforward PyTorch, blockwise PyTorch, fused
    without traces   form log_mean with one trace of zeros, whose term is 0: SupConLoss, fused
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from cpp_ext.ops import fused_problem, fused_soft_contrastive_loss
from cpp_ext.reference import Form, soft_contrastive_loss
from runtime.errors import NTFError

WIDTH = 128
TEMPERATURE = 0.07
ETA = 0.5

STRAIGHTFORWARD = "straightforward PyTorch"
BLOCKWISE = "blockwise PyTorch"
SUPCON = "SupConLoss"
FUSED = "fused"

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest error of the loss, and of the gradient as a share of its largest entry. Measured on a CPU against float64, the
# worst contender and N up to 8192: float32 8e-8 and 1e-6; bfloat16 4e-3 and 3e-2, float16 6e-4 and 5e-3, both from
# SupConLoss, which computes in the type of its inputs. TF32 rounds factors to 11 bits, as float16 does.
TOLERANCES = {"float32": (1e-6, 1e-5), "tf32": (1e-3, 3e-2), "bfloat16": (1e-2, 1e-1), "float16": (1e-3, 3e-2)}

# Above these the float64 oracle, and then any N x N array, would take longer than what is timed, or not fit.
LARGEST_FLOAT64_ROWS = 2048
LARGEST_SQUARE_ROWS = 8192
FLOAT16_LOSS_SCALE = 2.0**15
BLOCK_ROWS = 256


class LossBenchmarkError(NTFError):
    """A contender is missing or wrong, a device is missing, or a result is not there."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        embeddings: (N, 128), unit rows, requires a gradient.
        labels: (N,) int64, as many 0 as 1.
        traces: (J, 128), unit rows; one row of zeros in the contest without traces.
    """

    embeddings: Tensor
    labels: Tensor
    traces: Tensor


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Contest:
    """Contenders that compute the same value.

    Attributes:
        name: as in the results.
        form: reading of Eq. (5) of Liang et al. 2024 (arXiv:2403.16513).
        traces_share: J / N; 0 stands for a single trace of zeros.
        baseline: the contender that the others are compared with.
        contenders: by name, in the order of a round.
        largest_rows: the largest N of each contender.
        sizes: the N that are timed.
    """

    name: str
    form: Form
    traces_share: float
    baseline: str
    contenders: Mapping[str, Loss]
    largest_rows: Mapping[str, int]
    sizes: tuple[int, ...]

    def batch(self, n: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
        """N rows with labels in turn, and the contest's traces; the same for the same N."""
        generator = torch.Generator().manual_seed(n)
        count = int(n * self.traces_share)
        rows = torch.nn.functional.normalize(torch.randn(n + count, WIDTH, generator=generator), dim=1)
        traces = rows[n:].clone() if self.traces_share else torch.zeros(1, WIDTH)
        return Batch(
            rows[:n].to(device, dtype, copy=True).requires_grad_(),
            (torch.arange(n) % 2).to(device),
            traces.to(device, dtype),
        )

    def runners(self, n: int) -> dict[str, Loss]:
        """The contenders that take part with N rows."""
        return {name: loss for name, loss in self.contenders.items() if n <= self.largest_rows[name]}

    def counted_operations(self, n: int) -> dict[str, float]:
        """Floating point operations of the products that the loss is made of, whoever does how many of them.

        Forward z z^T and z h^T, 2 N C (N + J); backward two products with an N x N and one with an N x J array,
        2 N C (2 N + J); together 2 N C (3 N + 2 J).
        """
        traces = n * self.traces_share
        forward, backward = 2.0 * n * WIDTH * (n + traces), 2.0 * n * WIDTH * (2 * n + traces)
        return {"forward": forward, "backward": backward, "both": forward + backward}


def contests(device: str = "cpu", fused_loss: Callable[..., Tensor] | None = None) -> dict[str, Contest]:
    """Both contests, by name.

    Args:
        device: "cpu" or "cuda", on which the fused loss has to run.
        fused_loss: what takes the place of `cpp_ext.ops.fused_soft_contrastive_loss`.

    Raises:
        LossBenchmarkError: the fused loss cannot run there, or the peer library is not installed.
    """
    fused = fused_loss or _load_fused(device)
    everything = (64, 100, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    with_traces = Contest(
        name="with traces",
        form="log_sum",
        traces_share=0.5,
        baseline=STRAIGHTFORWARD,
        contenders={STRAIGHTFORWARD: _soft(soft_contrastive_loss), BLOCKWISE: blockwise, FUSED: _soft(fused)},
        largest_rows={STRAIGHTFORWARD: LARGEST_SQUARE_ROWS, BLOCKWISE: 16384, FUSED: 65536},
        sizes=everything,
    )
    without_traces = Contest(
        name="without traces",
        form="log_mean",
        traces_share=0.0,
        baseline=SUPCON,
        contenders={SUPCON: _load_supcon(), FUSED: _soft(fused, form="log_mean")},
        largest_rows={SUPCON: LARGEST_SQUARE_ROWS, FUSED: LARGEST_SQUARE_ROWS},
        sizes=(256, 1024, 2048, 4096, 8192),
    )
    return {contest.name: contest for contest in (with_traces, without_traces)}


def _soft(loss: Callable[..., Tensor], form: Form = "log_sum") -> Loss:
    def run(batch: Batch) -> Tensor:
        return loss(batch.embeddings, batch.labels, batch.traces, temperature=TEMPERATURE, eta=ETA, form=form)

    return run


def _load_fused(device: str) -> Callable[..., Tensor]:
    problem = fused_problem(device)
    if problem is not None:
        raise LossBenchmarkError(
            "the contender `fused`", got=f"this: {problem}", wanted="the fused loss", remedy="nothing was timed"
        )
    return fused_soft_contrastive_loss


def _load_supcon() -> Loss:
    """SupConLoss on rows that are unit vectors already, with the mean over all rows, as ours has it.

    Its defaults would normalise the rows again and leave out rows whose loss is 0.
    """
    try:
        from pytorch_metric_learning.distances import DotProductSimilarity
        from pytorch_metric_learning.losses import SupConLoss
        from pytorch_metric_learning.reducers import MeanReducer
    except ImportError as error:
        raise LossBenchmarkError(
            "SupConLoss, the peer",
            got=f"{error} on importing pytorch_metric_learning",
            wanted="the library",
            remedy="install the extra `dev`",
        ) from error
    peer = SupConLoss(TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False), reducer=MeanReducer())
    return lambda batch: peer(batch.embeddings, batch.labels)


def blockwise(batch: Batch) -> Tensor:
    """Mean loss, form log_sum, with the closed-form gradient, in plain PyTorch and 256 rows at a time.

    Needs memory for 256 x N arrays only. It is here to tell what the kernel adds to not storing N x N arrays, so it
    takes for granted what the benchmark's inputs are: both classes twice or more, and a trace.
    """
    loss: Tensor = _Blockwise.apply(batch.embeddings, batch.labels, batch.traces)
    return loss


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, labels, traces):
        z, h = embeddings.float(), traces.float()
        sign = 1.0 - 2.0 * labels
        log_keys, log_traces, pull = z.new_empty(len(z)), z.new_empty(len(z)), torch.empty_like(z)
        for start in range(0, len(z), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            log_keys[rows] = torch.logsumexp(_similarities(z, rows), 1)
            weighted = (z[rows] @ h.T).mul_((sign[rows] * ETA / TEMPERATURE)[:, None])
            log_traces[rows] = torch.logsumexp(weighted, 1)
            pull[rows] = weighted.sub_(log_traces[rows, None]).exp_() @ h
        sums, positives = _class_sums(z, labels)
        mean_positive = (z * (sums - z)).sum(1) / (positives * TEMPERATURE)
        ctx.save_for_backward(z, labels, log_keys, pull)
        ctx.dtype = embeddings.dtype
        return (log_keys - mean_positive - log_traces).mean()

    @staticmethod
    def backward(ctx, grad):
        z, labels, log_keys, pull = ctx.saved_tensors
        gradient = torch.empty_like(z)
        for start in range(0, len(z), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            s = _similarities(z, rows)
            weights = (s - log_keys[rows, None]).exp_().add_(s.sub_(log_keys).exp_())
            torch.mm(weights, z, out=gradient[rows])
        sums, positives = _class_sums(z, labels)
        # Each row is pulled to the others of its class, once as an anchor and once as a positive.
        gradient.sub_((sums - z) * (2.0 / positives)[:, None])
        gradient.sub_(pull * (ETA * (1.0 - 2.0 * labels))[:, None])
        return gradient.mul_(grad / (TEMPERATURE * len(z))).to(ctx.dtype), None, None


def _similarities(z: Tensor, rows: slice) -> Tensor:
    """s_ik for the anchors i of a block, -infinity for k = i."""
    s = (z[rows] @ z.T).div_(TEMPERATURE)
    s.diagonal(rows.start).fill_(float("-inf"))
    return s


def _class_sums(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) sum of z over each row's class, and (N,) |P(i)|."""
    sums = torch.zeros(2, z.shape[1], device=z.device).index_add_(0, labels, z)
    return sums[labels], (torch.bincount(labels, minlength=2)[labels] - 1).to(z.dtype)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let PyTorch's float32 products use TF32 for "tf32", and nothing but float32 otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precisions_of(device: str) -> tuple[str, ...]:
    """What is timed on a device: float32 on a CPU, and what the tensor cores of a GPU take.

    Raises:
        LossBenchmarkError: the device is not there, or unknown.
    """
    if device == "cpu":
        return ("float32",)
    if device != "cuda":
        raise LossBenchmarkError("device", got=device, wanted="cpu or cuda", remedy="choose one of them")
    if not torch.cuda.is_available():
        raise LossBenchmarkError(
            "device cuda",
            got="a machine on which torch sees no CUDA device",
            wanted="a GPU and its driver",
            remedy="nothing was timed; run this on such a machine, or leave out --device cuda",
        )
    # Before Ampere, tensor cores know float16 alone; bfloat16 would be emulated and TF32 silently be float32.
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    return tuple(DTYPES) if ampere else ("float32", "float16")


def value_and_gradient(loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the embeddings.

    With float16 the loss is scaled for the backward pass, as in training: SupConLoss divides by N twice, and 1 / N^2 is
    0 in float16 from N = 8192 up.
    """
    value = loss(batch)
    scale = FLOAT16_LOSS_SCALE if batch.embeddings.dtype == torch.float16 else 1.0
    (gradient,) = torch.autograd.grad(value, batch.embeddings, grad_outputs=torch.full_like(value, scale))
    return value.detach(), gradient if scale == 1.0 else gradient.float() / scale


def expected(contest: Contest, batch: Batch) -> tuple[Tensor, Tensor]:
    """What every contender has to return: from the oracle in float64, for many rows in float32.

    Above 8192 rows the blockwise version stands in, which has agreed with the oracle on fewer.
    """
    n = len(batch.embeddings)
    wide = torch.float64 if n <= LARGEST_FLOAT64_ROWS else torch.float32
    inputs = Batch(batch.embeddings.detach().to(wide).requires_grad_(), batch.labels, batch.traces.to(wide))
    if n <= LARGEST_SQUARE_ROWS:
        return value_and_gradient(_soft(soft_contrastive_loss, contest.form), inputs)
    if contest.form != "log_sum":
        raise LossBenchmarkError(
            f"the oracle of form {contest.form}", got=f"{n} rows", wanted="at most 8192", remedy="time fewer rows"
        )
    return value_and_gradient(blockwise, inputs)


def check_agreement(
    name: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: tuple[float, float]
) -> None:
    """Refuse to time a wrong result.

    Args:
        name: whose result it is.
        got: loss, and gradient (N, C).
        wanted: the same from the oracle.
        tolerance: relative to the loss, and to the largest entry of the gradient.

    Raises:
        LossBenchmarkError: loss or gradient is off, or not finite.
    """
    for what, mine, right, limit in zip(("loss", "gradient"), got, wanted, tolerance, strict=True):
        error = float((mine.double() - right.double()).abs().max() / right.double().abs().max())
        if not error <= limit:  # also when it is not a number
            raise LossBenchmarkError(
                f"the {what} of {name}",
                got=f"an error of {error:.1e} of its size",
                wanted=f"at most {limit:.0e}",
                remedy="it is not timed before it is right",
            )


# What the loss benchmark says about its inputs, for the results file.
SETTINGS = MappingProxyType({"width": WIDTH, "temperature": TEMPERATURE, "eta": ETA, "block_rows": BLOCK_ROWS})
