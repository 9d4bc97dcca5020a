"""Norms of filters (Li et al. 2017): small filters contribute little."""

from __future__ import annotations

import torch

from laasp_ray.criteria.registry import register


@register("l1")
def l1(filters: torch.Tensor) -> torch.Tensor:
    """Sum of absolute weights: (N, K) -> (N,)."""
    return filters.abs().sum(dim=1)


@register("l2")
def l2(filters: torch.Tensor) -> torch.Tensor:
    """Euclidean norm: (N, K) -> (N,)."""
    return filters.norm(dim=1)
