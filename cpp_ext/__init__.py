"""The soft contrastive loss, Eq. (5) of Liang et al. 2024 (arXiv:2403.16513); needs torch and nothing of ours."""

from cpp_ext.reference import soft_contrastive_loss

__all__ = ["soft_contrastive_loss"]
