"""Labels: the channel of each element of a tensor.

A channel has a number. A label holds such numbers for a tensor: int64, with the tensor's number of dimensions, and of
size 1 along dimensions where the numbers do not change, so that it broadcasts against the tensor. 0 means no channel. A
tensor may have several labels along different dimensions: a convolution's weight has one for its filters and one for
its inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Label = torch.Tensor


def along(numbers: np.ndarray, dim: int, ndim: int) -> Label:
    """The label of a tensor with `ndim` dimensions whose channels lie along `dim`."""
    shape = [1] * ndim
    shape[dim] = len(numbers)
    return torch.from_numpy(numbers).reshape(shape)


def varying(label: Label) -> tuple[int, ...]:
    """The dimensions along which a label varies."""
    return tuple(dim for dim, size in enumerate(label.shape) if size > 1)


def line(label: Label) -> np.ndarray:
    """The numbers (n,) of a label that varies along at most one dimension."""
    return label.reshape(-1).numpy()


def collapsed(numbers: torch.Tensor) -> Label:
    """The label of a full-sized tensor of numbers. 0 agrees with any number."""
    label = numbers.to(torch.int64)
    for dim in range(label.ndim):
        if label.shape[dim] > 1:
            highest = label.amax(dim, keepdim=True)
            if bool(((label == highest) | (label == 0)).all()):
                label = highest
    return label


def moved(label: Label, shape: Sequence[int], move: Callable[[torch.Tensor], object]) -> list[Label]:
    """The labels after an operation that only moves, repeats or drops elements of a tensor of `shape`.

    The operation is applied to the numbers themselves. There is one label for each tensor of its result.
    """
    given = move(label.expand(tuple(shape)).to(torch.float64).contiguous())
    tensors = [given] if isinstance(given, torch.Tensor) else list(given)  # type: ignore[call-overload]
    return [collapsed(tensor) for tensor in tensors]


class Channels:
    """All channels of a network, numbered from 1, and which of them are tied."""

    def __init__(self) -> None:
        self._count = 1
        self._pairs: list[np.ndarray] = []
        self.unmet: list[np.ndarray] = []
        """Channels that meet positions of another tensor without channels. These are constants and cannot shrink."""

    def new(self, count: int) -> np.ndarray:
        """New channels with numbers (count,)."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def tie(self, first: Label, second: Label) -> None:
        """Ties the channels of two labels that meet in the same element."""
        one, other = torch.broadcast_tensors(first, second)
        both = torch.stack([one.reshape(-1), other.reshape(-1)]).numpy()
        both = both[:, (both[0] > 0) & (both[1] > 0) & (both[0] != both[1])]
        if both.size:
            keys = np.unique(both[0] * self._count + both[1])
            self._pairs.append(np.stack([keys // self._count, keys % self._count]))

    def tie_lines(self, first: np.ndarray, second: np.ndarray) -> None:
        """Ties two lines of numbers (n,), element by element."""
        self.tie(torch.from_numpy(first), torch.from_numpy(second))

    def tie_along(self, label: Label, dims: Iterable[int]) -> Label:
        """Ties a label's channels that have the same position along all dimensions except `dims`. Returns the reduced
        label.
        """
        dims = [dim for dim in dims if label.shape[dim] > 1]
        if not dims:
            return label
        highest = label.amax(dims, keepdim=True)
        self.tie(label, highest)
        return highest

    def merged(self, labels: Iterable[Label]) -> list[Label]:
        """Merges labels of one tensor from several sources. Labels that share a dimension become one."""
        found: list[Label] = []
        for label in labels:
            sharing = [bool(set(varying(kept)) & set(varying(label))) for kept in found]
            for other in [kept for kept, shares in zip(found, sharing, strict=True) if shares]:
                self.tie(other, label)
                one, two = torch.broadcast_tensors(other, label)
                self.unmet += [two[(one == 0) & (two > 0)].numpy(), one[(two == 0) & (one > 0)].numpy()]
                label = collapsed(torch.where(one > 0, one, two))
            found = [kept for kept, shares in zip(found, sharing, strict=True) if not shares]
            found.append(label)
        return found

    def classes(self) -> np.ndarray:
        """The class of tied channels for each number. Only number 0 has class 0."""
        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.zeros((2, 0), np.int64)
        graph = coo_matrix((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(self._count, self._count))
        classes = connected_components(graph, directed=False)[1]
        # Number 0 is never tied, so its class comes first.
        assert classes[0] == 0
        return classes


def blocks_of_view(before: Label, after: Label) -> int | None:
    """The number of equal blocks that a change of shape cuts a line of channels into; 1 if none, None if not known."""
    if len(varying(after)) <= 1:
        return 1
    if len(varying(before)) > 1:
        sizes = [[size for size in label.shape if size > 1] for label in (before, after)]
        return 1 if sizes[0] == sizes[1] else None
    return math.prod(after.shape[dim] for dim in varying(after)[:-1])


def pieces(sizes: Sequence[int]) -> int | None:
    """The number of pieces if all sizes are equal, else None."""
    return len(sizes) if all(one == other for one, other in itertools.pairwise(sizes)) else None
