"""Keeps masks in training: momentum and weight decay would make pruned weights non-zero in the next step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from laasp_ray.errors import TrainingError
from laasp_ray.pruning.sparsity.groups import unpack_mask


class MaskEnforcer:
    """Sets the weights of `model` that `masks` (parameter name -> packed mask) prune to zero whenever `apply` is
    called.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, bytes]) -> None:
        """Raises TrainingError for a mask whose parameter the network does not have."""
        parameters = dict(model.named_parameters())
        self._pruned: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, packed in masks.items():
            if name not in parameters:
                raise TrainingError(f"there is a mask for {name}, but the network has no such parameter")
            parameter = parameters[name]
            # The mask needs the parameter's memory format, as the optimizer's momentum does.
            pruned = torch.empty_like(parameter, dtype=torch.bool).copy_(~unpack_mask(packed, parameter.shape))
            self._pruned.append((parameter, pruned))

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, pruned in self._pruned:
            parameter.masked_fill_(pruned, 0)
