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
LEAST_ROOM = 16
"""The least number of filters whose terms there is room for, before the room is made anew."""


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
        if order:
            for reader in left:
                reader.remove(order[-1])
        costs = torch.zeros(filters, dtype=torch.float64)
        for reader in left:
            costs[reader.filters] += reader.costs
        costs[~open_] = torch.inf
        best = int(costs.argmin())
        order.append(best)
        open_[best] = False
        quota[best // width] -= 1
        if not quota[best // width]:
            open_[best // width * width : (best // width + 1) * width] = False
    return order


def scores_from(order: Sequence[int], filters: int) -> torch.Tensor:
    """Scores (filters,) by which those of `order` are the lowest, in this order."""
    scores = torch.full((filters,), float(len(order)), dtype=torch.float64)
    for position, index in enumerate(order):
        scores[index] = position
    return scores


class _Left:
    """A reader without the filters that were taken. `costs` (f,) are those of its `filters` (f,) that are left.

    Of the inverse B and of the products G = W'W of its weights, only a filter's block with itself is kept up to date.
    The rows of a filter are computed when it is taken: with the changed weights, taking it makes B to B - U'U and G to
    G - U'Y - Y'U, and the terms U and Y (as many rows as it has inputs) of all filters taken so far give any row from
    the first values. So a step costs neither a pass over the rows of the weights nor a copy of the inverse.
    """

    def __init__(self, reader: ReadFilters) -> None:
        self.filters, self._inverse = reader.filters, reader.inverse
        self._inputs, self._fixed = _connected(reader)
        weights = reader.weights[:, self._inputs.flatten()]
        of_filters = weights.reshape(len(weights), *self._inputs.shape)
        self._products = torch.bmm(of_filters.permute(1, 2, 0), of_filters.permute(1, 0, 2))  # (f, m, m)
        self._blocks = reader.inverse[self._inputs.unsqueeze(2), self._inputs.unsqueeze(1)]  # (f, m, m)
        self._is_square = len(weights) > weights.shape[1]  # `_weights` is G itself, which is smaller
        self._weights = weights.T @ weights if self._is_square else weights
        self._gone = torch.zeros(len(self.filters), dtype=torch.bool)
        self._taken = 0  # rows of the terms that are in use
        self._u = self._y = weights.new_empty(0, weights.shape[1])
        self._begin()

    def remove(self, index: int) -> None:
        place = self._places.get(index)
        if place is None:
            return
        each = self._inputs.shape[1]
        if self._taken + each > len(self._u):
            self._shrink()
            place = self._places[index]
        own = slice(place * each, (place + 1) * each)
        u, y = self._new_terms(place, own)
        self._u[self._taken : self._taken + each], self._y[self._taken : self._taken + each] = u, y
        self._taken += each
        u_of, y_of = (term.reshape(each, len(self.filters), each).permute(1, 0, 2) for term in (u, y))
        self._blocks -= torch.bmm(u_of.transpose(1, 2), u_of)
        cross = torch.bmm(y_of.transpose(1, 2), u_of)
        self._products -= cross + cross.transpose(1, 2)
        self._gone[place] = True
        self._blocks[self._gone], self._products[self._gone] = torch.eye(each, dtype=torch.float64), 0.0
        self._fixed[place] = 0.0
        self.costs = self._costs()

    def _new_terms(self, place: int, own: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """U and Y (m, inputs) of the filter at `place`, whose inputs are `own`."""
        u, y = self._u[: self._taken], self._y[: self._taken]
        each = own.stop - own.start
        changes = torch.cat([u[:, own], y[:, own]], 1).T @ u
        rows = self._inverse[self._inputs[place]].index_select(1, self._inputs.flatten()) - changes[:each]
        products = self._weights[own] if self._is_square else self._weights[:, own].T @ self._weights
        products = products - changes[each:] - u[:, own].T @ y
        factor = torch.linalg.cholesky(rows[:, own])
        new_u = torch.linalg.solve_triangular(factor, rows, upper=False)
        scaled = torch.linalg.solve_triangular(factor, products, upper=False)
        inner = torch.linalg.solve_triangular(factor, scaled[:, own].T, upper=False)
        return new_u, scaled - inner @ new_u / 2

    def _costs(self) -> torch.Tensor:
        if self._inputs.shape[1] == 1:
            return self._fixed + (self._products / self._blocks).flatten()
        return self._fixed + (self._products * torch.linalg.inv(self._blocks)).sum((1, 2))

    def _begin(self) -> None:
        self._places = {int(index): place for place, index in enumerate(self.filters.tolist())}
        self.costs = self._costs()

    def _shrink(self) -> None:
        """Forgets the columns of filters that are gone, and makes room for the terms of some more."""
        stays = ~self._gone
        columns = stays.repeat_interleave(self._inputs.shape[1])
        self.filters, self._inputs, self._fixed = self.filters[stays], self._inputs[stays], self._fixed[stays]
        self._products, self._blocks, self._gone = self._products[stays], self._blocks[stays], self._gone[stays]
        self._weights = self._weights[columns][:, columns] if self._is_square else self._weights[:, columns]
        room = max(LEAST_ROOM, len(self.filters) // 8) * self._inputs.shape[1]
        grown = [term.new_empty(self._taken + room, int(columns.sum())) for term in (self._u, self._y)]
        for new, old in zip(grown, (self._u, self._y), strict=True):
            new[: self._taken] = old[: self._taken, columns]
        self._u, self._y = grown
        self._begin()


def _connected(reader: ReadFilters) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs (f, m) without those that have nothing to do with any other, and what these cost (f,) for ever.

    A tap of a kernel that only ever reads padding is such an input. It is left out if it is one for every filter.
    """
    alone = reader.inverse.count_nonzero(1) == 1
    apart = alone[reader.inputs].all(0)
    inputs = reader.inputs[:, apart]
    squares = reader.weights[:, inputs].square().sum(0)
    return reader.inputs[:, ~apart], (squares / reader.inverse[inputs, inputs]).sum(1)
