"""The branch points of a network that is pruned step by step, without running it after every step."""

from __future__ import annotations

import torch
from torch import nn

from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.structure import Structure, structure_of
from laasp_ray.search.engine import BranchPoints


class BranchPointMemory:
    """The last network's branch points, with the verdict whether it can be traced.

    After a prune both stay, as long as the network runs the same operations. After training the verdict is found anew,
    because it depends on the weights. `found` counts how often it was found.
    """

    def __init__(self, example: torch.Tensor, untraced: str | None = None) -> None:
        """`untraced` is the reason why no network is traced, for a loss that allows none; None: it is found."""
        self._example, self._untraced = example, untraced
        self._last: tuple[NetworkState, Structure | None, BranchPoints] | None = None
        self.found = 0

    def of(self, network: NetworkState, model: nn.Module) -> BranchPoints:
        """The branch points of `model`, which is `network` in eval mode. Their program may be one that cannot be
        run.
        """
        structure = structure_of(model)
        last = self._last
        if last is not None and structure is not None and structure == last[1] and only_pruned(last[0], network):
            branch_points = last[2].resized(model)
        else:
            branch_points, self.found = BranchPoints(model, self._example, self._untraced), self.found + 1
        self._last = network, structure, branch_points
        return branch_points


def only_pruned(before: NetworkState, after: NetworkState) -> bool:
    """Whether the tensors that a prune did not cut, one at least, have the same values.

    A compensated prune changes biases and statistics, too, and training changes all weights. So where a weight was not
    cut, only weights count.
    """
    if before.tensors.keys() != after.tensors.keys():
        return False
    pairs = [(tensor, after.tensors[name]) for name, tensor in before.tensors.items()]
    uncut = [(one, other) for one, other in pairs if one.shape == other.shape and one.is_floating_point()]
    weights = [(one, other) for one, other in uncut if one.ndim > 1]
    return bool(uncut) and all(torch.equal(one, other) for one, other in weights or uncut)
