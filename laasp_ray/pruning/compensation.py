"""What a layer does with the inputs that a prune leaves it, so that those that are gone are missed least.

A prune takes input channels from a layer that reads them. At each place the values of the lost channels are nearly a
linear function of those that stay. With that function put in for them, the layer's weights on the kept inputs and its
bias take the lost ones' part. For each reader this is exact least squares, and readers are independent of one another.

Source: Hassibi, Stork, Optimal Brain Surgeon, NeurIPS 1993, for channels and their kernels' taps together; He, Zhang,
Sun, Channel Pruning, ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from laasp_ray.models.device import on_device
from laasp_ray.pruning.plan import Plan, apply_plan


@dataclass(frozen=True, eq=False)
class LostInputs:
    """The `inputs` (rising) that one group of a layer loses, as a function of its others.

    `coefficients` float32 (explained, by + 1) has each of the lost inputs `explained`, of the kept inputs `by` and, in
    the last column, the constant. Lost inputs that are not named there are 0 whatever the others are.
    """

    inputs: tuple[int, ...]
    explained: np.ndarray
    by: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class Compensation:
    """How a layer makes up for the inputs that it loses. `groups` has an entry for each of the layer's groups.

    An input is a channel at one tap of the kernel, channel by channel, and `sharing` is 1. If one mix of channels
    serves all taps, an input is a channel, and `sharing` is the number of taps of the kernel, or of a channel's values
    in a flattened input.
    """

    groups: tuple[LostInputs, ...]
    sharing: int = 1

    def applied(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (out, inputs of a group, ...) afterwards, with zeros for lost inputs, and what the bias (out,)
        gains. Both have the weight's dtype and are on its device.
        """
        parts = weight.detach().reshape(len(self.groups), weight.shape[0] // len(self.groups), -1, self.sharing)
        changed, gains = [], []
        for part, lost in zip(parts, self.groups, strict=True):
            index, explained, by = (
                on_device(torch.tensor(some, dtype=torch.long), weight.device)
                for some in (lost.inputs, lost.explained, lost.by)
            )
            coefficients = on_device(torch.tensor(lost.coefficients, dtype=weight.dtype), weight.device)
            taken = part.index_select(1, explained)  # (out, explained, sharing)
            rest = part.index_fill(1, index, 0)
            changed.append(rest.index_add_(1, by, torch.einsum("olt,li->oit", taken, coefficients[:, :-1])))
            gains.append(torch.einsum("olt,l->o", taken, coefficients[:, -1]))
        result = torch.stack(changed).reshape(weight.shape)
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)
        return result, torch.cat(gains)


MadeUp = Mapping[str, Compensation]
"""Reader -> how it makes up for what a prune takes from it."""
NOTHING: MadeUp = {}


def apply_compensated(model: nn.Module, step: Plan, made_up: MadeUp, norms: Mapping[str, str] | None = None) -> Plan:
    """Prunes `model` in place by `step`, with its readers made up for. Returns the plan of what was done to it.

    The constant part goes into a layer's bias. Without a bias it is subtracted from the running mean of the BatchNorm
    that `norms` (layer -> BatchNorm) says follows, and else the layer gets a new bias, which the plan names. Tensors
    become new ones, so memory that `model` shares with another network is not written to.
    """
    new: list[str] = []
    for name, compensation in made_up.items():
        layer = model.get_submodule(name)
        old = layer.get_parameter("weight")
        weight, gain = compensation.applied(old.detach().double())
        old.data = weight.to(old.dtype)
        norm = model.get_submodule(norms[name]) if norms and name in norms else None
        if layer.bias is not None:
            bias = layer.get_parameter("bias")
            bias.data = (bias.detach().double() + gain).to(bias.dtype)
        elif norm is not None:
            mean = norm.get_buffer("running_mean")
            norm.running_mean = (mean.double() - gain).to(mean.dtype)
        else:
            layer.bias = nn.Parameter(gain.to(old.dtype), requires_grad=old.requires_grad)
            new.append(name)
    done = step.with_biases(new)
    apply_plan(model, done)
    return done
