"""The fused soft contrastive loss, and the choice between it and the reference.

The kernels are three operators in the library that `python -m cpp_ext.build` makes; here they get their fake kernels,
their gradient, and a wrapper that refuses what the reference refuses. Nothing is loaded before the first call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from cpp_ext import reference
from cpp_ext.library import (
    BUILD_COMMAND,
    FOLDER,
    LIBRARY_FILE,
    BuildError,
    BuildRecord,
    loadable_record,
    reading_lock,
    refused_library,
)
from cpp_ext.reference import Denominator, Form, Reduction

Backend = Literal["auto", "fused", "reference"]
Implementation = Literal["fused", "reference"]

# The numbers of the enumerations in csrc/soft_contrastive.h.
FORMS = {"log_sum": 0, "log_mean": 1, "literal": 2}
DENOMINATORS = {"all": 0, "negatives": 1}

_FORWARD = "ntf::soft_contrastive_forward"
_BACKWARD = "ntf::soft_contrastive_backward"
_TRACES_BACKWARD = "ntf::soft_contrastive_traces_backward"
_F = TypeVar("_F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_loading = threading.Lock()
_loaded: BuildRecord | None = None
_choosing = threading.Lock()
_warned = False


def _constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call `function` while it traces, and take the result as a constant of the graph."""
    # What torch.compiler.assume_constant_result does; that one imports the compiler, a second, for a mark.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
    backend: Backend = "auto",
) -> Tensor:
    """Soft contrastive loss, Eq. (5) of Liang et al. 2024 (arXiv:2403.16513), by the implementation of choice.

    Args:
        backend: "fused" (memory linear in N), "reference" (plain PyTorch), or "auto": fused where it is built for the
            embeddings' device, else the reference, with one logged warning a process. The first answer for a type of
            device is kept.

    Raises:
        ValueError: shapes, types or values that do not make sense.
        BuildError: "fused" was asked for and cannot run here.

    Note:
        The other arguments and the result are those of `cpp_ext.reference.soft_contrastive_loss`, on which both agree.
    """
    chosen = resolve_backend(backend, embeddings.device.type)
    function = fused_soft_contrastive_loss if chosen == "fused" else reference.soft_contrastive_loss
    return function(
        embeddings,
        labels,
        traces,
        temperature=temperature,
        eta=eta,
        form=form,
        denominator=denominator,
        reduction=reduction,
        trace_gradient=trace_gradient,
    )


def fused_soft_contrastive_loss(
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
    """Soft contrastive loss in one pass over tiles of z z^T; no array of N x N or N x J is made.

    Arguments, result and refused inputs are those of `cpp_ext.reference.soft_contrastive_loss`.

    Raises:
        ValueError: shapes, types or values that do not make sense.
        BuildError: the library is missing, stale, or without kernels for the embeddings' device.
        RuntimeError: a derivative in forward mode was asked for.

    Note:
        Same inputs and number of threads give the same bits. Safe to call from several threads. On CUDA the labels are
        not read back, so that the call does not wait: a row labelled neither 0 nor 1 has the loss NaN, and every
        gradient is NaN. There is one derivative, the first in reverse mode: second derivatives, forward mode (jvp,
        jacfwd, make_dual) and torch.func's transforms are refused; the reference has second derivatives and both modes.
        Under autocast nothing is computed in lower precision.
    """
    load_library()
    reference.check_soft_contrastive_inputs(embeddings, labels, traces, temperature, eta, form, denominator, reduction)
    device = embeddings.device.type
    if device not in _fused_devices():
        _refuse_device(device)
    traces = traces if trace_gradient else traces.detach()
    _refuse_forward_mode(embeddings, traces)
    # Without a gradient to come, the forward pass need not keep what the backward pass would use.
    save = embeddings.requires_grad and torch.is_grad_enabled()
    # The CPU kernel refuses labels other than 0 and 1 itself, with the reference's sentence: it sees them anyway.
    per_row = torch.ops.ntf.soft_contrastive_forward.default(
        embeddings,
        labels,
        traces,
        temperature,
        eta,
        FORMS[form],
        DENOMINATORS[denominator],
        save,
        device == "cuda" and _allow_tf32(),
    )[0]
    return reference.reduce_rows(per_row, reduction)


@_constant_when_compiled
def resolve_backend(backend: str, device: str) -> Implementation:
    """The implementation that runs for a choice on a device.

    Args:
        backend: "auto", "fused" or "reference".
        device: type of a torch device, "cpu" or "cuda".

    Raises:
        ValueError: another backend.
        BuildError: "fused" cannot run on this device.

    Note:
        The first answer to "auto" for a device is kept for the process, so that a build meanwhile changes no running
        computation. The first that is the reference logs the one warning, with the reason and the remedy.
    """
    if backend == "reference":
        return "reference"
    if backend not in ("auto", "fused"):
        raise ValueError(f"backend must be one of auto, fused, reference, got {backend!r}: choose one of them")
    if backend == "auto":
        with _choosing:
            return _automatic(device)
    problem = fused_problem(device)
    if problem is not None:
        raise problem
    return "fused"


@cache
def _automatic(device: str) -> Implementation:
    problem = fused_problem(device)
    if problem is None:
        return "fused"
    _warn_once(f"soft contrastive loss: the reference runs, memory grows with N x N; {problem}")
    return "reference"


def fused_problem(device: str) -> BuildError | None:
    """Why the fused loss cannot run on a device, or None; loads the library at the first call."""
    try:
        load_library()
        if device not in _fused_devices():
            _refuse_device(device)
    except BuildError as error:
        return error
    return None


@_constant_when_compiled
def load_library(folder: Path = FOLDER) -> None:
    """Load the compiled library once for the process, and register the operators' gradient and fake kernels.

    Args:
        folder: where `python -m cpp_ext.build` left it; only the first call's counts.

    Raises:
        BuildError: missing, stale, damaged, or built for another torch or machine.
    """
    global _loaded
    if _loaded is not None:
        return
    with _loading:
        if _loaded is None:
            with reading_lock(folder):
                record = loadable_record(folder, torch_version=torch.__version__, torch_cuda=torch.version.cuda)
                try:
                    torch.ops.load_library(str(folder / LIBRARY_FILE))  # type: ignore[no-untyped-call]
                except OSError as error:
                    raise refused_library(f"a library that does not load ({error.__cause__ or error})") from error
            _register()
            _loaded = record


def loaded_record() -> BuildRecord | None:
    """What the loaded library was built for; None before it is loaded."""
    return _loaded


def _fused_devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if _loaded is not None and _loaded.cuda_targets else ("cpu",)


def _refuse_device(device: str) -> NoReturn:
    cuda_part = "has no CUDA part" if device == "cuda" else "knows nothing of it"
    reason = _loaded.cpu_only_reason if _loaded is not None and device == "cuda" else ""
    raise BuildError(
        "the fused loss",
        got=f"embeddings on {device}, of which the library {cuda_part}{reason and f' ({reason})'}",
        wanted=f"embeddings on {' or '.join(_fused_devices())}",
        remedy=f'run {BUILD_COMMAND} where there is an nvcc, or take backend="reference"'
        if device == "cuda"
        else 'take backend="reference"',
    )


def _warn_once(text: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        _log.warning(text)


def forget_choices() -> None:
    """Let "auto" choose, and warn, as in a new process: for tests, and after a build in this one."""
    global _warned
    with _choosing:
        _automatic.cache_clear()
        _warned = False


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """Refuse tensors with a tangent: the operators' results would have none, which reads as a derivative of 0."""
    for tensor in tensors:
        primal, tangent = unpack_dual(tensor)  # type: ignore[no-untyped-call]
        # Outside forward mode, primal is the tensor itself. Within nested transforms, those of torch.func wrap tensors
        # and hide the outer one's tangent from the inner one.
        if tangent is not None or (primal is not tensor and torch.func.debug_unwrap(tensor) is not tensor):
            raise RuntimeError(
                "the fused soft contrastive loss has a derivative in reverse mode only, got a tensor with a tangent "
                '(jvp, jacfwd, make_dual): take backend="reference" for forward mode'
            )


@_constant_when_compiled
def _allow_tf32() -> bool:
    # Not matmul.allow_tf32: torch refuses to answer that once a program has used this newer setting.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _register() -> None:
    """Fake kernels and gradients of the three operators."""
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_fake(_TRACES_BACKWARD, _fake_traces_backward)
    torch.library.register_autograd(_FORWARD, _gradient, setup_context=_keep_for_gradient)
    for operator in (_BACKWARD, _TRACES_BACKWARD):
        torch.library.register_autograd(operator, _refuse_second_derivative)
    for operator in (_FORWARD, _BACKWARD, _TRACES_BACKWARD):
        torch.library.register_vmap(operator, _refuse_vmap)


def _fake_forward(
    embeddings: Tensor,
    labels: Tensor,
    traces: Tensor,
    temperature: float,
    eta: float,
    form: int,
    denominator: int,
    save: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c = embeddings.shape
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    rows = [embeddings.new_empty((n,), dtype=wide) for _ in range(4)]
    pull = embeddings.new_empty((n if save and form != FORMS["log_mean"] else 0, c), dtype=wide)
    return rows[0], rows[1], rows[2], rows[3], pull


def _fake_backward(grad_loss: Tensor, embeddings: Tensor, *_: Any) -> Tensor:
    return embeddings.new_empty(embeddings.shape)


def _fake_traces_backward(grad_loss: Tensor, embeddings: Tensor, labels: Tensor, traces: Tensor, *_: Any) -> Tensor:
    return traces.new_empty(traces.shape)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, traces, temperature, eta, form, denominator, _, allow_tf32 = inputs
    loss, log_keys, log_positives, log_traces, pull = output
    ctx.save_for_backward(embeddings, labels, traces, loss, log_keys, log_positives, log_traces, pull)
    ctx.settings = (temperature, eta, form, denominator, allow_tf32)
    ctx.mark_non_differentiable(log_keys, log_positives, log_traces, pull)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_embeddings = grad_traces = None
    if grad_loss is not None:
        _refuse_forward_mode(grad_loss)
        embeddings, labels, traces, loss, log_keys, log_positives, log_traces, pull = ctx.saved_tensors
        batch = (grad_loss, embeddings, labels, traces, loss)
        operators = torch.ops.ntf
        if ctx.needs_input_grad[0]:
            grad_embeddings = operators.soft_contrastive_backward.default(
                *batch, log_keys, log_positives, pull, *ctx.settings
            )
        if ctx.needs_input_grad[2]:
            grad_traces = operators.soft_contrastive_traces_backward.default(*batch, log_traces, *ctx.settings)
    return grad_embeddings, None, grad_traces, *(None,) * 6


def _refuse_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "the fused soft contrastive loss has a first derivative only, got a gradient of its gradient: take "
        'backend="reference" for second derivatives'
    )


def _refuse_vmap(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the fused soft contrastive loss takes one batch (N, C) a call, got a call under vmap: call it in a loop"
    )
