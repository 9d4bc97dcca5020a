"""The protocol of a trainer, and the trainer that works in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.models.format import to_fast_format
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.data import PhaseData
from laasp_ray.train.loop import EpochResult, PhaseResult, TrainingPhase, run_training_phase

OnEpoch = Callable[[EpochResult], None]


class Trainer(Protocol):
    def set_teacher(self, teacher: NetworkState) -> None:
        """Makes later training imitate `teacher`, as `train.distill` says. Called once."""

    def run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        """Trains `network` for the epochs of `training_phase` that are not done, then evaluates it.

        `optimizer_state` is that of the last finished epoch (see EpochResult). `on_epoch` is called once for each
        epoch, in order, with the weights after it. The weights of the last epoch are the result.
        """

    def close(self) -> None: ...


class InProcessTrainer:
    """A trainer with one rank in this process, for tests, small networks and machines without Ray."""

    def __init__(
        self, unpruned: nn.Module, config: RunConfig, device: torch.device, parts: int = 1, task: Task = CLASSIFICATION
    ) -> None:
        """`parts` is the number of parts of a global batch (train/step.py)."""
        self._unpruned, self._config, self._device, self._parts = unpruned, config, device, parts
        self._task = task
        self._data: PhaseData | None = None
        self._teacher: NetworkState | None = None

    def set_teacher(self, teacher: NetworkState) -> None:
        self._teacher = teacher

    def run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        config, teacher = self._config, self._teacher
        if self._data is None:
            self._data = PhaseData(
                config.data,
                batch_size=config.train.global_batch(self._parts),
                seed=config.seed,
                device=self._device,
                parts=self._parts,
                excluded=training_phase.excluded,
                places=training_phase.places,
                task=self._task,
            )
        for event in run_training_phase(
            rebuild_on(self._device, self._unpruned, network, config.model.input_shape),
            optimizer_state,
            training_phase,
            data=self._data,
            config=config.train,
            seed=config.seed,
            teacher=rebuild_on(self._device, self._unpruned, teacher, config.model.input_shape)
            if teacher is not None
            else None,
        ):
            if isinstance(event, PhaseResult):
                return event
            on_epoch(event)
        raise AssertionError("a training phase ends with its evaluation")

    def close(self) -> None:
        if self._data is not None:
            self._data.close()


def rebuild_on(
    device: torch.device, unpruned: nn.Module, network: NetworkState, input_shape: Sequence[int]
) -> nn.Module:
    """`network` rebuilt on `device`. On a GPU it is channels last, if it runs so on an input of `input_shape` (C, H,
    W).
    """
    model = rebuild(unpruned, network).to(device)
    if device.type != "cuda":
        return model
    with random_state_kept():
        return to_fast_format(model, torch.zeros(1, *input_shape, device=device))
