"""Makes a network's program (program.py): the network is traced, in-place operations are removed, BatchNorms are
folded. The program is checked against the network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from laasp_ray.errors import describe_error, is_out_of_memory
from laasp_ray.pruning.masked_norms import NORMS
from laasp_ray.pruning.masking import is_bare
from laasp_ray.pruning.structure import defaults_of
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.search.fresh import ACTIVATIONS, SUMS, WEIGHTED, is_activation, is_fresh
from laasp_ray.search.mutation import InPlaceProxy, without_mutation
from laasp_ray.search.precision import full_precision
from laasp_ray.search.program import CannotTrace, Operation, Program, Value

_TOLERANCE = 1e-4
"""Largest allowed difference between a program's output and the network's, relative to the largest output. It is far
above float32's rounding.
"""
_NOISE_IMAGES = 3
"""The number of noise images. They show differences that the first image may hide, for example a blank one."""


@full_precision()
@torch.inference_mode()
def verdict(model: nn.Module, example: torch.Tensor) -> str:
    """The reason why a network in eval mode is not traced, or empty. It is found on the CPU in float32 on every device.

    The program must give the network's outputs for `example` (B, ...) and for noise. There is no program for a network
    whose forward pass depends on its input's values, that returns more than one tensor, or that is not deterministic.
    """
    network, first = model, example
    if example.device.type != "cpu":
        try:
            network, first = clone_sharing_parameters(model).cpu(), example.cpu()
            network(first)
        except Exception:  # code that needs its device is checked there
            network, first = model, example
    program = checked(network, first)
    return program.reason if isinstance(program, CannotTrace) else ""


@full_precision()
@torch.inference_mode()
def checked(model: nn.Module, example: torch.Tensor) -> Program | CannotTrace:
    """The program of a network in eval mode if it gives the network's outputs, on the device of `example`, or the
    reason why it does not or there is none.
    """
    images, wanted = _outputs(model, example)
    program = trace(model, example)
    if isinstance(program, CannotTrace):
        return program
    fault = _fault(model, program, images, wanted)
    return CannotTrace(fault) if fault else program


@full_precision()
@torch.inference_mode()
def trace(model: nn.Module, example: torch.Tensor) -> Program | CannotTrace:
    """The program of a network in eval mode, or the reason why there is none. `verdict` compares it with the
    network.
    """
    network = clone_sharing_parameters(model).eval()
    in_place = [
        name
        for name, module in network.named_modules(remove_duplicate=False)
        if type(module).__module__.startswith("torch.nn") and getattr(module, "inplace", None) is True
    ]
    for name in in_place:
        cast(Any, network.get_submodule(name)).inplace = False
    try:
        graph = _Tracer().trace(network, defaults_of(network))
    except Exception as error:  # tracing runs the network's own code and can fail in any way
        return CannotTrace(f"its forward pass cannot be traced ({describe_error(error)})")
    try:
        return _program_of(graph, network, in_place, example)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return CannotTrace(f"its traced operations do not run ({describe_error(error)})")


def _program_of(
    graph: fx.Graph, network: nn.Module, in_place: Sequence[str], example: torch.Tensor
) -> Program | CannotTrace:
    mutation = without_mutation(graph, network, in_place, example)
    if mutation is not None:
        return mutation
    modules = _fold(network, graph)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not body or result is not body[-1]:
        return CannotTrace("it does not make one tensor of one tensor")
    place = {node: position for position, node in enumerate([inputs[0], *body])}
    operations = [Operation(run=_given, fresh=False)]
    operations += [_operation(node, network, modules, place) for node in body]
    return _measured(operations, [inputs[0], *body], modules, example)


def _outputs(model: nn.Module, example: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """`example`, with noise images added if the network accepts them, and the network's output. Raises the network's
    errors.
    """
    if example.is_floating_point():
        noise = torch.randn(_NOISE_IMAGES, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        images = torch.cat([example, noise.to(example)]).contiguous(memory_format=_format_of(example))
        try:
            return images, model(images.clone())
        except Exception as error:  # a network may refuse noise
            if is_out_of_memory(error):
                raise
    return example, model(example.clone())


def _fault(model: nn.Module, program: Program, images: torch.Tensor, wanted: Any) -> str:
    """Describes how the program's outputs differ from the network's, `wanted`. Empty if they do not."""
    if not _same(model(images.clone()), wanted):
        return "it is not deterministic in eval mode: the same images give something else every time"
    try:
        found = next(program.run(images, {}, whole=True))[2]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"its traced operations do not run ({describe_error(error)})"
    return "" if _same(found, wanted) else "its traced operations do not give what it gives"


def _same(found: Any, wanted: Any) -> bool:
    """Whether two outputs are equal up to rounding. Values that are not finite must be the same, as losses show
    them.
    """
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor) or found.shape != wanted.shape:
        return False
    scale = float(wanted.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)


def _format_of(tensor: torch.Tensor) -> torch.memory_format:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is traced as one operation: also layers that a network derives from torch's."""
        return isinstance(module, (*WEIGHTED, *NORMS)) or super().is_leaf_module(module, qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)


def _fold(network: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """The network's modules by name. Each BatchNorm after a convolution is folded into it and removed from the
    graph.
    """
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
        return Operation(node.target, arguments, keywords, reads, fresh=is_fresh(node, modules))
    if node.op == "call_module":
        return Operation(modules[node.target], arguments, keywords, reads, node.target, is_fresh(node, modules))
    if node.op == "get_attr":
        constant = functools.reduce(getattr, node.target.split("."), network)
        return Operation(lambda: constant)
    return Operation(functools.partial(_call_method, node.target), arguments, keywords, reads)


def _call_method(name: str, instance: Any, *arguments: Any, **keywords: Any) -> Any:
    return getattr(instance, name)(*arguments, **keywords)


def _given() -> torch.Tensor:
    raise AssertionError("the input is not computed")


def _measured(
    operations: list[Operation], nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], example: torch.Tensor
) -> Program | CannotTrace:
    """The program, with what each operation costs on an image and which may overwrite what.

    Returns a reason if a layer changes its input in place, which only a layer with code of its own can do.
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
            return CannotTrace(f"{operation.module} changes its input in place")
        values.append(value)
        per_output = module.get_parameter("weight")[0].numel() if isinstance(module, WEIGHTED) else 0
        macs = value.numel() // images * per_output if per_output else 0
        size = _bytes(value) // images if operation.reads else 0  # parameters need no memory of their own
        elements = value.numel() // images if torch.is_tensor(value) else 0
        measured.append(replace(operation, macs=macs, bytes=size, elements=elements))
        over = [
            read
            for read in operation.reads
            if operations[read].fresh and len(nodes[read].users) == 1 and _alike(values[read], value)
        ]
        overwrite = _overwriting(node, operation, over[0], modules) if over else None
        if overwrite is not None:
            measured[-1] = replace(measured[-1], overwrite=overwrite, overwritten=over[0])
    sized = any(not isinstance(value, torch.Tensor) for value in values)
    return Program(measured, modules, sized)


def _alike(one: Any, other: Any) -> bool:
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and one.shape == other.shape and one.dtype == other.dtype


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _overwriting(
    node: fx.Node, operation: Operation, read: int, modules: Mapping[str, nn.Module]
) -> Callable[..., Any] | None:
    """The in-place form of an operation, which writes into the memory of one of its arguments. None if there is
    none.
    """
    module = modules.get(operation.module)
    if module is not None and is_activation(module):
        in_place = copy.copy(module)
        cast(Any, in_place).inplace = True
        return in_place
    if node.target in ACTIVATIONS:
        return functools.partial(_in_place, node.target)
    terms = [Value(read), *(Value(other) for other in operation.reads if other != read)]
    if node.target in SUMS and not operation.keywords and len(terms) == 2 and len(operation.arguments) == 2:
        first = operation.arguments[0] == terms[0]
        return torch.Tensor.add_ if first else _add_to_second
    return None


def _add_to_second(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return second.add_(first)


def _in_place(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **{**keywords, "inplace": True})
