"""The moving average of a network in training. It is smoother than the network after any one step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from laasp_ray.models.suitable import EXTRA_STATE


class MovingAverage:
    """An exponential moving average of the state dict of `model`: weights and BatchNorm statistics.

    `tensors` begins as a copy of the network's tensors. Entries that are not floating-point numbers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the network after optimizer step `step` (counted from 1) to the average.

        The decay of step n is at most (1 + n) / (10 + n), so that the first values do not stay in the average for long.
        """
        averages: list[torch.Tensor] = []
        current: list[torch.Tensor] = []
        for name, tensor in self._model.state_dict().items():
            if name.endswith(EXTRA_STATE):  # extra state is copied: its meaning is not known
                self.tensors[name] = tensor.detach().clone()
            elif tensor.is_floating_point():
                averages.append(self.tensors[name])
                current.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))(averages, current, None)

    def buffers(self) -> list[torch.Tensor]:
        """The averages of all entries that are not parameters."""
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        return [tensor for name, tensor in self.tensors.items() if name not in parameters]
