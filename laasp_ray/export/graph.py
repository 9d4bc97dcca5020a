"""The convolutions of an exported graph against those that were planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laasp_ray.errors import ExportError
from laasp_ray.pruning.plan import Plan

_SHOWN = 3
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class GraphConvolution:
    """A convolution of a graph: the name of its weight (as in the state dict, where the exporter kept it), the weight's
    shape and the number of groups. Both give its channels.
    """

    weight: str
    shape: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        return f"{self.weight} {self.shape} in {self.groups} groups"


def planned_convolutions(unpruned: nn.Module, plan: Plan) -> dict[str, GraphConvolution]:
    """Weight -> its convolution after `plan`, worked out from the unpruned network and the plan alone."""
    planned = {}
    for name, module in unpruned.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            weight = f"{name}.weight" if name else "weight"
            shape = list(module.weight.shape)
            for axis, kept in plan.tensors.get(weight, {}).items():
                shape[axis] = len(kept[0])
            groups = plan.attributes.get(name, {}).get("groups", module.groups)
            assert isinstance(groups, int)
            planned[weight] = GraphConvolution(weight, tuple(shape), groups)
    return planned


def check_convolutions(
    found: Sequence[GraphConvolution], planned: Mapping[str, GraphConvolution], called: Sequence[str]
) -> int:
    """Compares every convolution of a graph with its plan, and returns their number.

    `called` are the weights of the convolutions that one forward pass of the network runs, once for each call. A
    convolution whose weight has lost its name in the graph is compared by its shape. Raises ExportError naming those
    that differ or are missing.
    """
    wrong = [f"{one}, planned {planned[one.weight]}" for one in found if planned.get(one.weight, one) != one]
    named = Counter(one.weight for one in found)
    without_name = Counter((one.shape, one.groups) for one in found if one.weight not in planned)
    for weight, calls in Counter(called).items():
        one = planned[weight]
        lacking = calls - named[weight]
        if lacking > without_name[one.shape, one.groups]:
            wrong.append(f"{one} is not in the graph")
        elif lacking > 0:
            without_name[one.shape, one.groups] -= lacking
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ExportError(f"convolutions of the exported graph are not as planned: {'; '.join(wrong[:_SHOWN])}{more}")
    return len(found)


def called_convolutions(model: nn.Module, inputs: torch.Tensor) -> list[str]:
    """The weights of the convolutions that a forward pass runs, in order, once for each call."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    ]
    try:
        with torch.inference_mode():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


def convolutions_of_onnx(model: Any) -> list[GraphConvolution]:
    """The convolutions of an ONNX model (onnx.ModelProto), in order."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in inferred.value_info
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [
        GraphConvolution(node.input[1], shapes.get(node.input[1], ()), _groups(node))
        for node in _nodes(model.graph, model.functions)
        if node.op_type in _CONVOLUTIONS
    ]


def _nodes(graph: Any, functions: Any) -> list[Any]:
    """All nodes, those of control flow and of functions of the model's own, too."""
    nodes = []
    for node in (*graph.node, *(node for function in functions for node in function.node)):
        nodes.append(node)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                nodes += _nodes(inner, ())
    return nodes


def _groups(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def convolutions_of_program(program: torch.export.ExportedProgram) -> list[GraphConvolution]:
    """The convolutions of a program of torch.export, in order."""
    parameters = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    found = []
    for node in program.graph.nodes:
        kind = str(node.target)
        if node.op == "call_function" and kind.startswith("aten.conv"):
            weight = node.args[1]
            arguments = {
                a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)
            } | node.kwargs
            shape = tuple(int(size) for size in weight.meta["val"].shape)
            found.append(GraphConvolution(parameters.get(weight.name, weight.name), shape, arguments.get("groups", 1)))
    return found
