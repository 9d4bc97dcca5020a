"""Who trains: the protocol, and the trainer that works in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.train.data import SpellData
from laasp_ray.train.loop import EpochDone, Spell, SpellDone, run_spell

OnEpoch = Callable[[EpochDone], None]


class Trainer(Protocol):
    def run(
        self, network: NetworkState, momentum: Mapping[str, torch.Tensor], spell: Spell, on_epoch: OnEpoch
    ) -> SpellDone:
        """Trains `network` for the epochs of `spell` that are not done, then evaluates it.

        `on_epoch` hears of every epoch, once, in order, with the weights after it; the last one's are the result.
        """

    def close(self) -> None: ...


class InProcessTrainer:
    """One rank, in this process; for tests, for small networks and for machines without Ray."""

    def __init__(self, unpruned: nn.Module, config: RunConfig, device: torch.device) -> None:
        self._unpruned, self._config, self._device = unpruned, config, device
        self._data: SpellData | None = None

    def run(
        self, network: NetworkState, momentum: Mapping[str, torch.Tensor], spell: Spell, on_epoch: OnEpoch
    ) -> SpellDone:
        config = self._config
        if self._data is None:
            self._data = SpellData(
                config.data,
                batch_size=config.train.batch_size,
                seed=config.seed,
                device=self._device,
                excluded=spell.excluded,
            )
        model = rebuild(self._unpruned, network).to(self._device)
        if self._device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for event in run_spell(model, momentum, spell, data=self._data, config=config.train, seed=config.seed):
            if isinstance(event, SpellDone):
                return event
            on_epoch(event)
        raise AssertionError("a spell ends with its evaluation")

    def close(self) -> None:
        if self._data is not None:
            self._data.close()
