"""Removes in-place operations from a traced network, because branches of a program share values.

A node that reads a value after it was changed in place must read the changed value. The graph expresses this if the
value itself is read. If the value is read through a view, the graph is not used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from laasp_ray.search.fresh import is_fresh
from laasp_ray.search.program import CannotTrace

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OUT_OF_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in _OPERATORS
}


class InPlaceProxy(fx.Proxy):
    """A value of a traced network for which `x += 1` works in place, as for a tensor, and is not `x = x + 1`."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    def change(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in _OPERATORS:
    setattr(InPlaceProxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


@dataclass(frozen=True)
class _Write:
    """`node` changed its first argument in place. With `maybe` it did so only if that is a tensor, because numbers do
    not change.
    """

    node: fx.Node
    name: str
    maybe: bool = False

    @property
    def target(self) -> fx.Node:
        first = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        assert isinstance(first, fx.Node)
        return first


def without_mutation(
    graph: fx.Graph, network: nn.Module, in_place: Sequence[str], example: torch.Tensor
) -> CannotTrace | None:
    """Makes operations leave their inputs alone, with the same results; or says which cannot.

    `in_place` are the modules of `network` that worked in place and were changed not to.
    """
    writes: list[_Write] = []
    for node in graph.nodes:
        found = _made_pure(node, in_place)
        if isinstance(found, CannotTrace):
            return found
        if found is not None and isinstance(node.args[0] if node.args else node.kwargs.get("input"), fx.Node):
            writes.append(found)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for write in writes:
        for reader in [] if write.maybe else _later_readers(write, order):
            reader.replace_input_with(write.target, write.node)
    modules = dict(network.named_modules())
    doubtful = [write for write in writes if not (is_fresh(write.target, modules) and len(write.target.users) == 1)]
    return _read_again(doubtful, graph, network, example, order) if doubtful else None


def _made_pure(node: fx.Node, in_place: Sequence[str]) -> _Write | CannotTrace | None:
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        return _Write(node, name) if name in in_place else None
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return _Write(node, name)
    if node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return _Write(node, name, maybe=True)
    if node.op == "call_method" and name.endswith("_") and callable(getattr(torch.Tensor, name[:-1], None)):
        node.target = name[:-1]
        return _Write(node, name)
    if node.op in ("call_function", "call_method") and (name.endswith("_") or name == "setitem"):
        return CannotTrace(f"{name} changes a tensor in place")
    return CannotTrace(f"{name} writes into a tensor given to it") if "out" in node.kwargs else None


def _later_readers(write: _Write, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    return [reader for reader in write.target.users if order[reader] > order[write.node]]


def _read_again(
    writes: Sequence[_Write],
    graph: fx.Graph,
    network: nn.Module,
    example: torch.Tensor,
    order: Mapping[fx.Node, int],
) -> CannotTrace | None:
    """A reason if a value that was changed in place is read afterwards through other memory than the result's."""
    values = _values(graph, network, example)
    for write in writes:
        target = values.get(write.target)
        if not isinstance(target, torch.Tensor):
            continue
        place, memory = order[write.node], _memory(target)
        views = [
            node
            for node, value in values.items()
            if order[node] < place and memory in _memories(value) and (write.maybe or node is not write.target)
        ]
        if any(order[reader] > place for view in views for reader in view.users):
            return CannotTrace(
                f"its traced operations do not give what it gives: {write.name} changes a value that is read again"
            )
    return None


def _values(graph: fx.Graph, network: nn.Module, example: torch.Tensor) -> Mapping[fx.Node, Any]:
    """The result of every operation for `example`; all are kept."""
    interpreter = fx.Interpreter(network, garbage_collect_values=False, graph=graph)
    interpreter.run(example)
    return interpreter.env


def _memories(value: Any) -> set[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return {_memory(item) for item in values if isinstance(item, torch.Tensor)}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
