"""A check by running that removing channels does what it should: the same as silencing them.

A dependency graph is inferred from a trace, and a network can do things that the inference does not see (shuffled
channels, sizes written into the forward pass). So every layer is tried out: the network with channels removed must
give the outputs of the network whose layers are deaf to those channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from laasp_ray.copying import deep_copy
from laasp_ray.errors import PruningError
from laasp_ray.pruning.channels import Removal, Side, plan_of
from laasp_ray.pruning.plan import apply_plan

_TOLERANCE = 1e-4
"""Greatest difference, relative to the greatest output: far above rounding, far below a wrong channel."""


def twin(model: nn.Module) -> nn.Module:
    """A copy of a network that shares the parameters' memory, but has its own Parameter objects and buffers.

    It may be pruned, moved, and have `requires_grad` set; its parameters must not be written to.
    """
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in model.parameters()
    }
    return deep_copy(model, memo)


def scramble(model: nn.Module, example: torch.Tensor) -> None:
    """Gives normalisations and learned scales random values, always the same, at which every channel tells.

    On a new network most channels are alike (scales 1, offsets 0) or next to silent, and a mistake between them would
    not show. Running statistics are set so that `example` keeps its scale from layer to layer.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator) * (high - low) + low

    def set_statistics(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        square = inputs[0].square().mean()
        module.running_mean = uniform(module.get_buffer("running_mean"), -0.25, 0.25) * square.sqrt()
        module.running_var = uniform(module.get_buffer("running_var"), 0.5, 1.5) * square

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() == max(parameter.shape, default=0):
                parameter.data = uniform(parameter, -0.25, 0.25) if name == "bias" else uniform(parameter, 0.5, 1.5)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(set_statistics))
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()


def fault_of(model: nn.Module, example: torch.Tensor, removal: Removal) -> str | None:
    """Why this removal is wrong, or None. `model` is on the CPU, in eval mode, and is not changed.

    Where a module normalises over its channels, removing is not silencing: then only that the network runs and its
    outputs keep their shapes is asked for.
    """
    pruned, silenced = twin(model), twin(model)
    try:
        apply_plan(pruned, plan_of(removal))
    except PruningError as error:
        return str(error)
    if not any(side.normalises for side in removal):
        for side, channels in removal.items():
            if side.role == "inputs":
                _silence(silenced, side, sorted(channels))
    with torch.no_grad():
        wanted = list(tensors_in(silenced(example)))
        try:
            found = list(tensors_in(pruned(example)))
        except Exception as error:  # the network's own code may raise anything here, and that is the finding
            return f"the network does not run without them ({type(error).__name__}: {_first_line(error)})"
    return _difference(wanted, found, exact=not any(side.normalises for side in removal))


def tensors_in(output: object) -> Iterator[torch.Tensor]:
    """The tensors in a network's output, however nested."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)


def _silence(model: nn.Module, side: Side, channels: list[int]) -> None:
    """Makes a layer deaf to these channels of its input."""
    layer, indices = model.get_submodule(side.module), torch.tensor(channels)
    axis = -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1

    def mute(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].index_fill(axis, indices, 0), *inputs[1:])

    layer.register_forward_pre_hook(mute)


def _difference(wanted: list[torch.Tensor], found: list[torch.Tensor], *, exact: bool) -> str | None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        return f"the network's outputs would change shape from {shapes[0]} to {shapes[1]}"
    for before, after in zip(wanted, found, strict=True):
        scale = float(before.abs().max()) if before.numel() else 0.0
        if exact and not float((before - after).abs().max()) <= _TOLERANCE * scale:
            return (
                "removing them is not the same as silencing them: the network mixes its channels in a way that "
                "the dependency graph does not see"
            )
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
