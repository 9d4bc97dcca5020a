"""The operations of a network's forward pass, to tell whether a pruned network does the same as the one before."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from laasp_ray.errors import describe_error, is_out_of_memory
from laasp_ray.pruning.masking import is_bare
from laasp_ray.pruning.verify import clone_sharing_parameters

logger = logging.getLogger(__name__)

Structure = tuple[str, ...]
"""Each operation with its arguments, in order. Sizes that the network's code computes are operations, not numbers."""


def structure_of(model: nn.Module) -> Structure | None:
    """The structure of a network's forward pass. Two networks of equal structure run the same operations.

    None if that is not known: the forward pass cannot be traced without values, makes tensors of its own, or runs hooks
    or parametrisations.
    """
    if not all(is_bare(module) and not parametrize.is_parametrized(module) for module in model.modules()):
        return None
    probe = clone_sharing_parameters(model)
    graph = traced(probe)
    if graph is None:
        return None
    places = {node: f"%{position}" for position, node in enumerate(graph.nodes)}
    return None if any("_tensor_constant" in str(node.target) for node in graph.nodes) else _lines(graph, probe, places)


def traced(network: nn.Module) -> fx.Graph | None:
    """The operations of a network's forward pass; None if it cannot be traced without values."""
    try:
        return fx.Tracer().trace(network, defaults_of(network))
    except Exception as error:  # tracing runs the network's own code and can fail in any way
        if is_out_of_memory(error):
            raise
        logger.debug("the network's structure is not known: %s", describe_error(error))
        return None


def defaults_of(network: nn.Module) -> dict[str, Any] | None:
    """The options of a network's forward pass at their defaults, which tracing would otherwise take for tensors."""
    options = list(inspect.signature(type(network).forward).parameters.values())[2:]
    plain = {
        option.name: option.default
        for option in options
        if option.default is None or option.default is True or option.default is False
    }
    return plain or None


def _lines(graph: fx.Graph, network: nn.Module, places: dict[fx.Node, str]) -> Structure:
    lines = []
    for node in graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: _Name(places[other]))
        kind = type(network.get_submodule(str(node.target))) if node.op == "call_module" else ""
        target = node.target if isinstance(node.target, str) else f"{node.target!r} {id(node.target)}"
        lines.append(f"{node.op} {target} {kind} {arguments!r}")
    return tuple(lines)


class _Name(str):
    """A result of an earlier operation, which is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
