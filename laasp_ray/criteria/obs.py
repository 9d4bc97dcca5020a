"""obs: the filters that the layers reading them miss least, if these make up for them.

The criterion needs the readers' weights and the moments of their inputs (pruning/moments.py). Filters are taken one
after the other. After each, its readers' weights and moments are those of the network without it.

Source: Hassibi, Stork, Optimal Brain Surgeon, NeurIPS 1993, for a channel's weights together, as in Kurtic, Frantar,
Alistarh, ZipLM, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laasp_ray.criteria.registry import register
from laasp_ray.errors import ConfigError

NAME = "obs"


@dataclass(frozen=True)
class ReadFilters:
    """What one group of a reader has of a layer's filters.

    `filters` (f,) are those that it reads, each as the `inputs` (f, m) of the group. `weights` float64 (rows, inputs)
    are scaled by what follows the reader. `inverse` float64 (inputs, inputs) is that of the inputs' covariance.
    """

    filters: torch.Tensor
    inputs: torch.Tensor
    weights: torch.Tensor
    inverse: torch.Tensor


@register(NAME)
def obs(filters: torch.Tensor) -> torch.Tensor:
    """Refuses: a layer's own weights are not enough (missed_least has the scores)."""
    raise ConfigError(f"criterion {NAME!r} scores what other layers read, not weights: it needs the network and images")


def missed_least(readers: Sequence[ReadFilters], filters: int, count: int, blocks: int = 1) -> list[int]:
    """`count` of a layer's `filters`, in the order in which they are taken, as many of each of `blocks` equal blocks.

    The cost of a filter is what its readers' outputs lose in square, summed over the readers, although the other inputs
    make up for it: tr(w C w'), with w the filter's weights and C the covariance of its inputs given all others. Of
    equal costs the lower filter goes first.
    """
    left = [_Left(reader) for reader in readers]
    quota = [count // blocks] * blocks
    width = filters // blocks
    open_ = torch.ones(filters, dtype=torch.bool)
    order: list[int] = []
    for _ in range(count):
        costs = torch.zeros(filters, dtype=torch.float64)
        for reader in left:
            reader.add_costs(costs)
        costs[~open_] = torch.inf
        best = int(costs.argmin())
        order.append(best)
        open_[best] = False
        quota[best // width] -= 1
        if not quota[best // width]:
            open_[best // width * width : (best // width + 1) * width] = False
        for reader in left:
            reader.remove(best)
    return order


def scores_from(order: Sequence[int], filters: int) -> torch.Tensor:
    """Scores (filters,) by which those of `order` are the lowest, in this order."""
    scores = torch.full((filters,), float(len(order)), dtype=torch.float64)
    for position, index in enumerate(order):
        scores[index] = position
    return scores


class _Left:
    """A reader without the filters that were taken.

    The inverse is not changed, which would cost a copy of it. Instead the rows of what was taken are kept, with which
    any of its blocks is brought up to date.
    """

    def __init__(self, reader: ReadFilters) -> None:
        self._reader, self._weights = reader, reader.weights.clone()
        self._place = {int(index): place for place, index in enumerate(reader.filters.tolist())}
        inputs = reader.inputs
        self._blocks = reader.inverse[inputs.unsqueeze(2), inputs.unsqueeze(1)]  # (f, m, m)
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows (m, inputs), their block's inverse (m, m)
        self._gone = torch.zeros(len(inputs), dtype=torch.bool)

    def add_costs(self, costs: torch.Tensor) -> None:
        own = self._weights[:, self._reader.inputs]  # (rows, f, m)
        there = ~self._gone
        covariances = torch.linalg.inv(self._blocks[there])
        found = torch.einsum("rfm,fmn,rfn->f", own[:, there], covariances, own[:, there])
        costs[self._reader.filters[there]] += found

    def remove(self, index: int) -> None:
        place = self._place.get(index)
        if place is None:
            return
        inputs = self._reader.inputs[place]
        rows = self._reader.inverse[inputs].clone()
        for earlier, inner in self._taken:
            rows -= earlier[:, inputs].T @ inner @ earlier
        inner = torch.linalg.inv(rows[:, inputs])
        self._weights -= self._weights[:, inputs] @ inner @ rows
        self._gone[place] = True
        of_filters = rows[:, self._reader.inputs].transpose(0, 1)  # (f, m of the taken, m)
        self._blocks -= of_filters.transpose(1, 2) @ inner @ of_filters
        self._taken.append((rows, inner))
