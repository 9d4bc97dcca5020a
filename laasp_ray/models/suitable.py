"""Refuses networks that cannot be copied, pruned or stored, before anything is tried on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from laasp_ray.errors import ConfigError

EXTRA_STATE = "_extra_state"
"""The suffix of the name of a module's extra state in torch's state dict."""

_STATISTICS = ("running_mean", "running_var")
_REMEDIES: tuple[tuple[type, str, str], ...] = (
    (WeightNorm, "weight_norm", "torch.nn.utils.remove_weight_norm({module}, {tensor!r})"),
    (SpectralNorm, "spectral_norm", "torch.nn.utils.remove_spectral_norm({module}, {tensor!r})"),
    (BasePruningMethod, "torch.nn.utils.prune", "torch.nn.utils.prune.remove({module}, {tensor!r})"),
)


def check_suitable(model: nn.Module) -> None:
    """Raises ConfigError, naming the module, the reason and the remedy, for a network that a run cannot use.

    Such networks are compiled or scripted ones, and those with parametrised modules, with extra state that is not a
    tensor, or with weights that are not finite.
    """
    for name, module in model.named_modules():
        reason = _reason(f"module {name}" if name else "the network", name, module)
        if reason:
            raise ConfigError(reason)
    broken = not_finite(model, model.state_dict())
    if broken:
        raise ConfigError(
            f"the network's weights are not finite (NaN or infinite) in {len(broken)} tensors ({shown(broken)}): give "
            "weights from before they diverged"
        )


def not_finite(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors of a state dict of `model` that hold NaN, or infinity where it is not allowed.

    Buffers may be infinite, as attention masks are, except for the statistics of a normalisation.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and not _is_sound(tensor, strictly=name in parameters or name.rpartition(".")[2] in _STATISTICS)
    ]


def shown(names: list[str], most: int = 3) -> str:
    """The first few names, as an error lists them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _is_sound(tensor: torch.Tensor, *, strictly: bool) -> bool:
    return bool(torch.isfinite(tensor).all()) if strictly else not bool(torch.isnan(tensor).any())


def _reason(place: str, name: str, module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return (
            f"{place} is TorchScript ({type(module).__name__}), whose layers cannot be cut: give the nn.Module that it "
            "was made from, and script the pruned network"
        )
    if hasattr(module, "_orig_mod") and type(module).__name__ == "OptimizedModule":  # torch._dynamo is slow to import
        return (
            f"{place} is compiled (torch.compile), and would keep the code of its uncut layers: give the network "
            f"itself, {name + '.' if name else 'model.'}_orig_mod, and compile the pruned one"
        )
    return _parametrised(place, name, module) or _extra(place, module)


def _parametrised(place: str, name: str, module: nn.Module) -> str:
    code = f"model.get_submodule({name!r})" if name else "model"
    if parametrize.is_parametrized(module):
        tensor = next(iter(module.parametrizations))  # type: ignore[arg-type]
        kinds = " and ".join(type(part).__name__.lstrip("_") for part in module.parametrizations[tensor])  # type: ignore[index, union-attr]
        return (
            f"{tensor} of {place} is parametrised ({kinds}): what it is computed from cannot be cut; remove that "
            f"first, torch.nn.utils.parametrize.remove_parametrizations({code}, {tensor!r})"
        )
    for hook in module._forward_pre_hooks.values():
        for kind, what, remedy in _REMEDIES:
            if isinstance(hook, kind):
                tensor = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
                return (
                    f"{tensor} of {place} is computed anew in every forward pass ({what}), and cannot be cut; remove "
                    f"that first, {remedy.format(module=code, tensor=tensor)}"
                )
    return ""


def _extra(place: str, module: nn.Module) -> str:
    if type(module).get_extra_state is nn.Module.get_extra_state:
        return ""
    state = module.get_extra_state()
    if isinstance(state, torch.Tensor):
        return ""
    return (
        f"{place} keeps extra state of type {type(state).__name__}, and checkpoints hold tensors only: have its "
        "get_extra_state give a tensor, or hold the value in a buffer"
    )
