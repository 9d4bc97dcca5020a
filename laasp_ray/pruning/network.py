"""A network in a form that processes exchange: the plan of what was pruned, and the remaining weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.models.copying import deep_copy
from laasp_ray.models.suitable import EXTRA_STATE
from laasp_ray.pruning.plan import Plan, apply_plan


@dataclass(frozen=True)
class NetworkState:
    """`tensors` is a state dict on the CPU, of the unpruned network after `plan`."""

    plan: Plan
    tensors: Mapping[str, torch.Tensor]


def capture(model: nn.Module, plan: Plan) -> NetworkState:
    """Copies the network's weights and buffers to the CPU."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    return NetworkState(plan, tensors)


def rebuild(unpruned: nn.Module, state: NetworkState) -> nn.Module:
    """Makes a new network from a copy of `unpruned`. The tensors of `state` are copied, never aliased.

    They may be views of Ray's object store, which must not be changed.
    """
    model = deep_copy(unpruned)
    apply_plan(model, state.plan)
    tensors = {
        name: tensor.clone() if name.endswith(EXTRA_STATE) else tensor for name, tensor in state.tensors.items()
    }  # a module may store the extra state object that it gets
    model.load_state_dict(tensors, strict=True, assign=False)
    return model
