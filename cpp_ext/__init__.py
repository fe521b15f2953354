"""The soft contrastive loss, Eq. (5) of Liang et al. 2024 (arXiv:2403.16513); needs torch and nothing of ours.

    from cpp_ext import soft_contrastive_loss

    loss = soft_contrastive_loss(embeddings, labels, traces, temperature=0.07, eta=0.5)

Public names are resolved when they are first used, so importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpp_ext.distributed import gather_rows, gathered_soft_contrastive_loss
    from cpp_ext.library import BuildError
    from cpp_ext.ops import fused_soft_contrastive_loss, soft_contrastive_loss

_HOME = {
    "BuildError": "cpp_ext.library",
    "fused_soft_contrastive_loss": "cpp_ext.ops",
    "gather_rows": "cpp_ext.distributed",
    "gathered_soft_contrastive_loss": "cpp_ext.distributed",
    "soft_contrastive_loss": "cpp_ext.ops",
}

__all__ = [
    "BuildError",
    "fused_soft_contrastive_loss",
    "gather_rows",
    "gathered_soft_contrastive_loss",
    "soft_contrastive_loss",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'cpp_ext' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
