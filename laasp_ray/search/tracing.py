"""From a network to its program (program.py): traced, rid of what works in place, BatchNorms folded, and checked."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from laasp_ray.pruning.masks import is_bare
from laasp_ray.pruning.verify import twin
from laasp_ray.search.program import Operation, Program, Value

_TOLERANCE = 1e-3
"""Greatest difference between a program's output and the network's, relative to the greatest output."""

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_SUMS = (operator.add, torch.add)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_FRESH = (*_WEIGHTED, nn.modules.batchnorm._BatchNorm)
_ACTIVATIONS = (
    functional.relu,
    functional.relu6,
    functional.hardtanh,
    functional.hardswish,
    functional.silu,
    functional.leaky_relu,
    functional.elu,
    functional.mish,
)
"""Functions whose result is memory of its own unless they are told `inplace`."""


@torch.inference_mode()
def trace(model: nn.Module, example: torch.Tensor) -> Program | str:
    """The program of a network in eval mode, checked against it on `example` (B, ...); or why there is none.

    A network whose forward pass depends on its input's values has none, nor has one that gives more than one tensor.
    """
    network = twin(model).eval()
    for module in network.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            cast(Any, module).inplace = False  # values are shared by branches
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # tracing runs the network's own code and can fail in any way
        return f"its forward pass cannot be traced ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    reason = _without_mutation(graph)
    if reason is not None:
        return reason
    modules = _fold(network, graph)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not body or result is not body[-1]:
        return "it does not make one tensor of one tensor"
    place = {node: position for position, node in enumerate([inputs[0], *body])}
    operations = [Operation(run=_given, fresh=False)]
    operations += [_operation(node, network, modules, place) for node in body]
    program = _measured(operations, [inputs[0], *body], modules, example)
    if isinstance(program, str):
        return program
    wanted, found = model(example), next(program.run(example, {}, whole=True))[2]
    assert isinstance(found, torch.Tensor)
    scale = float(wanted.abs().max())
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= _TOLERANCE * scale:
        return "its traced operations do not give what it gives"
    return program


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Layers stay whole, also those that a network derives from torch's."""
        return isinstance(module, _WEIGHTED) or super().is_leaf_module(module, qualified_name)


def _without_mutation(graph: fx.Graph) -> str | None:
    """Makes operations leave their inputs alone; or says which cannot."""
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.op == "call_method" and name.endswith("_") and callable(getattr(torch.Tensor, name[:-1], None)):
            node.target = name[:-1]
        elif node.op in ("call_function", "call_method") and (name.endswith("_") or name == "setitem"):
            return f"{name} changes a tensor in place"
        elif "out" in node.kwargs:
            return f"{name} writes into a tensor given to it"
    return None


def _fold(network: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """The network's modules by name, each BatchNorm that follows a convolution folded into it and out of the graph."""
    modules = dict(network.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        norm_name, layer_name = str(node.target), str(before.target)
        norm, layer = modules[norm_name], modules[layer_name]
        if (
            type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            and type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            and norm.running_mean is not None
            and len(before.users) == calls[layer_name] == calls[norm_name] == 1
            and is_bare(norm)
            and is_bare(layer)
        ):
            modules[layer_name] = fuse_conv_bn_eval(layer, norm)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    return modules


def _operation(
    node: fx.Node, network: nn.Module, modules: Mapping[str, nn.Module], place: Mapping[fx.Node, int]
) -> Operation:
    def value(other: fx.Node) -> Any:
        return Value(place[other])

    arguments, keywords = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    reads = tuple(place[other] for other in node.all_input_nodes)
    if callable(node.target):
        fresh = node.target in _SUMS or node.target in _ACTIVATIONS
        return Operation(node.target, arguments, keywords, reads, fresh=fresh)
    if node.op == "call_module":
        module = modules[node.target]
        fresh = isinstance(module, _FRESH) or _is_activation(module)
        return Operation(module, arguments, keywords, reads, node.target, fresh)
    if node.op == "get_attr":
        constant = functools.reduce(getattr, node.target.split("."), network)
        return Operation(lambda: constant)
    return Operation(functools.partial(_call_method, node.target), arguments, keywords, reads)


def _call_method(name: str, instance: Any, *arguments: Any, **keywords: Any) -> Any:
    return getattr(instance, name)(*arguments, **keywords)


def _given() -> torch.Tensor:
    raise AssertionError("the input is not computed")


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and hasattr(module, "inplace")


def _measured(
    operations: list[Operation], nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], example: torch.Tensor
) -> Program | str:
    """The program, with what each operation costs on an image and which may overwrite what.

    Or the layer that changes its input in place, which only one with code of its own can do.
    """
    plain = Program(operations, modules, sized=True)
    values: list[Any] = [example]
    images = len(example)
    measured = [replace(operations[0], bytes=_bytes(example) // images)]
    for operation, node in zip(operations[1:], nodes[1:], strict=True):
        module = modules.get(operation.module)
        foreign = module is not None and not type(module).__module__.startswith("torch.nn")
        before = [(read, values[read].clone()) for read in operation.reads if foreign and torch.is_tensor(values[read])]
        value = plain.perform(operation, values.__getitem__, overwrite=False)
        if not all(torch.equal(values[read], old) for read, old in before):
            return f"{operation.module} changes its input in place"
        values.append(value)
        per_output = module.get_parameter("weight")[0].numel() if isinstance(module, _WEIGHTED) else 0
        macs = value.numel() // images * per_output if per_output else 0
        size = _bytes(value) // images if operation.reads else 0  # parameters take no memory of their own
        measured.append(replace(operation, macs=macs, bytes=size))
        over = [
            read
            for read in operation.reads
            if operations[read].fresh
            and len(nodes[read].users) == 1
            and values[read].shape == getattr(value, "shape", None)  # a split gives a tuple
        ]
        overwrite = _overwriting(node, operation, over[0], modules) if over else None
        if overwrite is not None:
            measured[-1] = replace(measured[-1], overwrite=overwrite, overwritten=over[0])
    sized = any(not isinstance(value, torch.Tensor) for value in values)
    return Program(measured, modules, sized)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _overwriting(
    node: fx.Node, operation: Operation, read: int, modules: Mapping[str, nn.Module]
) -> Callable[..., Any] | None:
    """The operation done into the memory of one of its arguments, where there is such a form of it."""
    module = modules.get(operation.module)
    if module is not None and _is_activation(module):
        in_place = copy.copy(module)
        cast(Any, in_place).inplace = True
        return in_place
    if node.target in _ACTIVATIONS:
        return functools.partial(_in_place, node.target)
    terms = [Value(read), *(Value(other) for other in operation.reads if other != read)]
    if node.target in _SUMS and not operation.keywords and len(terms) == 2 and len(operation.arguments) == 2:
        first = operation.arguments[0] == terms[0]
        return torch.Tensor.add_ if first else _add_to_second
    return None


def _add_to_second(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return second.add_(first)


def _in_place(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **{**keywords, "inplace": True})
