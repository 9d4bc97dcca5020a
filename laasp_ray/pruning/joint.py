"""Prunes of several layers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from laasp_ray.pruning.channels import ChannelAxis, Removal, unite
from laasp_ray.pruning.graph import PruningGraph


def independent_layers(graph: PruningGraph) -> tuple[str, ...]:
    """The layers whose filters are coupled to no other layer's filters, in network order.

    In a residual network these are layers inside the blocks, because a shortcut ties the others together. If the first
    block has a convolution in its shortcut (ResNet-50), the network's first convolution is tied to nothing and is
    included. A depthwise convolution after a layer does not count as coupled: it has one filter per input and no choice
    of its own.
    """
    return tuple(name for name in graph.layers if not any(_tied(side, name) for side in _one_prune(graph, name)))


def joint_removal(graph: PruningGraph, filters: Mapping[str, Sequence[int]]) -> Removal:
    """The channels that are removed with these filters of each layer. Raises PruningError as `PruningGraph.removal`
    does.
    """
    total: dict[ChannelAxis, set[int]] = {}
    for layer, chosen in filters.items():
        unite(total, graph.removal(layer, chosen))
    return total


def _one_prune(graph: PruningGraph, layer: str) -> Removal:
    group = graph.layers[layer]
    return graph.removal(layer, range(0, group.filters, group.filters // group.blocks))


def _tied(side: ChannelAxis, layer: str) -> bool:
    depthwise = "groups" in side.attributes  # its number of groups is its number of channels
    return side.role == "filters" and side.module != layer and not depthwise
