"""A network on its way between processes: what was removed from the unpruned one, and the weights of what is left."""

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
    """A copy of the network's weights and buffers, on the CPU."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    return NetworkState(plan, tensors)


def rebuild(unpruned: nn.Module, state: NetworkState) -> nn.Module:
    """A new network from a copy of `unpruned`; the tensors of `state` are copied, never aliased.

    They may be views of Ray's object store, which must not be written to.
    """
    model = deep_copy(unpruned)
    apply_plan(model, state.plan)
    tensors = {
        name: tensor.clone() if name.endswith(EXTRA_STATE) else tensor for name, tensor in state.tensors.items()
    }  # a module may keep the extra state that it is given
    model.load_state_dict(tensors, strict=True, assign=False)
    return model
