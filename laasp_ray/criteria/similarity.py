"""Distances between the filters of a layer: the other filters can replace a filter that is close to them.

`euclidean` follows the geometric-median criterion (He et al. 2019), and `cosine` the definition in LAASP (Ghimire et
al. 2023). Both are matrix products in double precision, rounded at the end. They are fast, there is no cancellation
between nearly equal filters, and equal filters get the same score.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from laasp_ray.criteria.registry import register


@register("euclidean")
def euclidean(filters: torch.Tensor) -> torch.Tensor:
    """Sum of Euclidean distances to all filters: (N, K) -> (N,)."""
    precise = filters.double()
    squares = precise.square().sum(dim=1)
    distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * precise @ precise.T).clamp_min(0).sqrt()
    return distances.sum(dim=1).to(filters.dtype)


@register("cosine")
def cosine(filters: torch.Tensor) -> torch.Tensor:
    """Sum of (1 - cosine similarity) to all filters: (N, K) -> (N,). A filter of zeros has similarity 0 to all."""
    directions = F.normalize(filters.double(), dim=1)
    return (1 - directions @ directions.T).sum(dim=1).to(filters.dtype)


@register("cosine_dissimilar")
def cosine_dissimilar(filters: torch.Tensor) -> torch.Tensor:
    """The reverse order of `cosine`, as in the reference code of 2022: the filter least like the others is pruned
    first.
    """
    return -cosine(filters)
