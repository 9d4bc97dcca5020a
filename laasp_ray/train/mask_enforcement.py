"""Keeps masks in training: momentum and weight decay would make pruned weights non-zero in the next step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from laasp_ray.errors import TrainingError
from laasp_ray.pruning.sparsity.groups import unpack_mask


class MaskEnforcer:
    """Sets the weights of `model` that `masks` (parameter name -> packed mask) prune to zero whenever `apply` is
    called. A weight that is not finite stays so: training has diverged.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, bytes]) -> None:
        """Raises TrainingError for a mask whose parameter the network does not have."""
        parameters = dict(model.named_parameters())
        self._masked: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        for name, packed in masks.items():
            if name not in parameters:
                raise TrainingError(f"there is a mask for {name}, but the network has no such parameter")
            parameter = parameters[name]
            self._masked.append(parameter)
            # 1 where kept, in the parameter's own memory format, as the optimizer's momentum is.
            self._kept.append(torch.empty_like(parameter).copy_(unpack_mask(packed, parameter.shape)))

    @torch.no_grad()
    def apply(self) -> None:
        if self._masked:
            torch._foreach_mul_(self._masked, self._kept)
            torch._foreach_add_(self._masked, 0.0)  # makes 0 of -0
