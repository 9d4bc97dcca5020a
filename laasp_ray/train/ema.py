"""The moving average of a network in training, which is smoother than any of the networks on the way."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from laasp_ray.models.suitable import EXTRA_STATE


class MovingAverage:
    """An exponential moving average of the state dict of `model`: weights and BatchNorm statistics.

    `tensors` begins as a copy of what the network holds. Entries that are no floating-point numbers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the network after optimizer step `step`, counted from 1.

        The decay of step n is at most (1 + n) / (10 + n), so that what the average began as does not linger.
        """
        averages: list[torch.Tensor] = []
        current: list[torch.Tensor] = []
        for name, tensor in self._model.state_dict().items():
            if name.endswith(EXTRA_STATE):  # whatever a module keeps there is its own
                self.tensors[name] = tensor.detach().clone()
            elif tensor.is_floating_point():
                averages.append(self.tensors[name])
                current.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))(averages, current, None)

    def buffers(self) -> list[torch.Tensor]:
        """The averages of what is no parameter."""
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        return [tensor for name, tensor in self.tensors.items() if name not in parameters]
