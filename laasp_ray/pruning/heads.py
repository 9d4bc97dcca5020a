"""Attention heads, which are pruned whole: rows of one layer for queries, keys and values, and columns of the next.

A module with heads is known by its parts: a number `num_heads`, a linear layer `qkv` whose rows are those of the
queries, keys and values, head by head, and a linear layer `proj` that reads the heads' outputs, as in timm. Its number
of heads, and the sum of their widths, if it keeps that, change with them. What the module does with its heads is its
own: every candidate is tried, and must give what the network gives if `proj` reads zeros from the heads that are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from laasp_ray.errors import PruningError, is_out_of_memory
from laasp_ray.pruning.channels import CannotPrune, ChannelAxis, describe, plan_of
from laasp_ray.pruning.coupling import Coupling
from laasp_ray.pruning.faults import retried
from laasp_ray.pruning.flow import tensors_of
from laasp_ray.pruning.masking import is_plain
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters, difference

_HEADS, _WIDTH = "num_heads", "attn_dim"
_OF_ALL = ("queries", "keys", "values")


@dataclass(frozen=True)
class Attention:
    """A module with `heads` heads of `width` channels each. `qkv` and `proj` are the names of its layers."""

    module: str
    qkv: str
    proj: str
    heads: int
    width: int

    def coupling(self, model: nn.Module, first_class: int) -> Coupling | CannotPrune:
        """The coupling of `qkv`, whose filters are heads."""
        inner = self.heads * self.width
        columns = {head: tuple(range(head * self.width, (head + 1) * self.width)) for head in range(self.heads)}
        rows = {
            head: tuple(part * inner + column for part in range(len(_OF_ALL)) for column in of_head)
            for head, of_head in columns.items()
        }
        own = describe(self.qkv, model.get_submodule(self.qkv), inputs=False)
        read = describe(self.proj, model.get_submodule(self.proj), inputs=True)
        for side in (own, read):
            if isinstance(side, CannotPrune):
                return side
        assert isinstance(own, ChannelAxis) and isinstance(read, ChannelAxis)
        sides: dict[ChannelAxis, Mapping[int, tuple[int, ...]]] = {
            own: rows,
            read: columns,
            _counted(self.module, _HEADS, self.heads): {head: (head,) for head in columns},
        }
        if hasattr(model.get_submodule(self.module), _WIDTH):
            sides[_counted(self.module, _WIDTH, inner)] = columns
        classes = first_class + np.arange(self.heads)
        return Coupling(sides, 1, classes, tuple(range(len(sides))))


def attentions(model: nn.Module) -> dict[str, Attention]:
    """The modules with several heads, by the names of their layers `qkv`."""
    found = {}
    for name, module in model.named_modules():
        heads, qkv, proj = getattr(module, _HEADS, None), module._modules.get("qkv"), module._modules.get("proj")
        if type(heads) is not int or heads < 2 or not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
            continue
        if qkv.out_features == len(_OF_ALL) * proj.in_features and proj.in_features % heads == 0 and is_plain(proj):
            prefix = f"{name}." if name else ""
            width = proj.in_features // heads
            found[f"{prefix}qkv"] = Attention(name, f"{prefix}qkv", f"{prefix}proj", heads, width)
    return found


def head_couplings(
    probe: nn.Module, example: torch.Tensor, names: Collection[str], first_class: int
) -> tuple[dict[str, Coupling], dict[str, str]]:
    """The couplings of the layers of these names whose filters are heads, and why others have none, by layer.

    `probe` is as for verify.fault_of. Every layer is tried with one head gone, and with all but one.
    """
    couplings: dict[str, Coupling] = {}
    reasons: dict[str, str] = {}
    for name, attention in attentions(probe).items():
        if name not in names:
            continue
        coupling = attention.coupling(probe, first_class)
        first_class += attention.heads
        if isinstance(coupling, CannotPrune):
            reasons[name] = coupling.reason
            continue
        for gone in {(0,), tuple(range(1, attention.heads))}:
            fault = retried(functools.partial(_fault, probe, example, attention, coupling, gone))
            if fault is not None:
                reasons[name] = f"its heads cannot be removed: {fault}"
                break
        else:
            couplings[name] = coupling
    return couplings, reasons


def kept_filters(plan: Plan, unpruned: nn.Module) -> dict[str, int]:
    """Pruned layer -> the number of its filters that are left after `plan`. Heads count as filters."""
    counts = {layer: len(kept) for layer, kept in plan.layers.items()}
    for layer, attention in attentions(unpruned).items():
        if layer in counts and _HEADS in plan.attributes.get(attention.module, {}):
            counts[layer] //= len(_OF_ALL) * attention.width
    return counts


def _counted(module: str, attribute: str, size: int) -> ChannelAxis:
    return ChannelAxis(module, "channels", size, 1, (), (attribute,))


@torch.no_grad()
def _fault(
    probe: nn.Module, example: torch.Tensor, attention: Attention, coupling: Coupling, gone: tuple[int, ...]
) -> str | None:
    silenced, pruned = clone_sharing_parameters(probe), clone_sharing_parameters(probe)
    proj = silenced.get_submodule(attention.proj)
    columns = [head * attention.width + column for head in gone for column in range(attention.width)]
    weight = proj.get_parameter("weight").index_fill(1, torch.tensor(columns), 0)
    proj._parameters["weight"] = nn.Parameter(weight)
    try:
        apply_plan(pruned, plan_of(coupling.removal(gone)))
        found = list(tensors_of(pruned(example)))
    except PruningError as error:
        return str(error)
    except Exception as error:  # the network's own code may raise any error, and the error is the result
        if is_out_of_memory(error):
            raise
        line = (str(error).splitlines() or [""])[0][:200]
        return f"the network's code fixes how many there are ({type(error).__name__}: {line})"
    return difference(list(tensors_of(silenced(example))), found)
