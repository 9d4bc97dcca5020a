"""Distances between the filters of a layer: the other filters can replace a filter that is close to them.

`euclidean` follows the geometric-median criterion (He et al. 2019), and `cosine` the definition in LAASP (Ghimire et
al. 2023). Both are computed in double precision and rounded at the end. They are fast, there is no cancellation between
nearly equal filters, and equal filters get the same score.
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
    products = 2 * precise @ precise.T
    # In place, because (N, N) in double precision is 32 MB for 2,048 filters.
    distances = torch.sub(squares.unsqueeze(0) + squares.unsqueeze(1), products, out=products).clamp_min_(0).sqrt_()
    return distances.sum(dim=1).to(filters.dtype)


@register("cosine")
def cosine(filters: torch.Tensor) -> torch.Tensor:
    """Sum of (1 - cosine similarity) to all filters: (N, K) -> (N,). A filter of zeros has similarity 0 to all."""
    directions = F.normalize(filters.double(), dim=1)
    # The sum of similarities is the similarity to the sum, which needs O(N K) operations instead of O(N^2 K). A matrix
    # product is not used, because it may add up the terms of equal filters in different orders.
    similarities = (directions * directions.sum(dim=0)).sum(dim=1)
    return (len(directions) - similarities).to(filters.dtype)


@register("cosine_dissimilar")
def cosine_dissimilar(filters: torch.Tensor) -> torch.Tensor:
    """The reverse order of `cosine`, as in the reference code of 2022: the filter least like the others is pruned
    first.
    """
    return -cosine(filters)
