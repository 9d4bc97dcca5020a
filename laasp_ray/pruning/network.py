"""A network on its way between processes: what was removed from the unpruned one, and the weights of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.copying import deep_copy
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
    model.load_state_dict(state.tensors, strict=True, assign=False)
    return model
