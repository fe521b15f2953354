"""The soft contrastive loss, forward and backward apart."""

from __future__ import annotations

import pytest
import torch

from cpp_ext.reference import soft_contrastive_loss

OPTIONS = {"temperature": 0.07, "eta": 0.5}


def batch(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings (n, 128), labels (n,) and traces (n / 2, 128)."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.nn.functional.normalize(torch.randn(n + n // 2, 128, generator=generator), dim=1).to(dtype)
    return rows[:n].requires_grad_(), torch.arange(n) % 2, rows[n:]


@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_loss(benchmark, n, direction):
    exact = soft_contrastive_loss(*batch(n, torch.float64), **OPTIONS)
    embeddings, labels, traces = batch(n, torch.float32)
    loss = soft_contrastive_loss(embeddings, labels, traces, **OPTIONS)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    benchmark.group = f"soft contrastive loss, {direction}, N = {n}"
    benchmark.name = "reference (PyTorch)"
    benchmark.extra_info["baseline"] = True
    if direction == "forward":
        benchmark(soft_contrastive_loss, embeddings, labels, traces, **OPTIONS)
    else:
        benchmark(lambda: torch.autograd.grad(loss, embeddings, retain_graph=True))
