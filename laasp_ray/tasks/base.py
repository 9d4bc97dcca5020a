"""The interface of a task. Training, search, evaluation and the checks before a run use it and know no loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.examples.source import OwnData
from laasp_ray.records import Metrics
from laasp_ray.tasks.identity import identity_of

TRIAL_IMAGES = 2
"""The examples of a trial batch: the smallest that a worker may get, which a normalisation over images must accept."""


@dataclass(frozen=True)
class Task(ABC):
    """A loss and its metrics. `data` is the user's own data set, or None: images, as `config.data` says.

    `inputs` below is what the network takes, with one row or item for each of n examples. `targets` are of any
    structure: labels (n,) of images, or what an own data set gives.
    """

    data: OwnData | None = None

    @property
    @abstractmethod
    def primary(self) -> tuple[str, Literal["higher", "lower"]]:
        """The name of what networks are compared by (of records.Metrics), and which values of it are better."""

    @property
    def runs_model(self) -> bool:
        """Whether the loss runs the network itself, and so needs it instead of its outputs."""
        return False

    @property
    def responses(self) -> Callable[[Any], torch.Tensor] | None:
        """Gives the responses (n, d), floats, of targets, for criteria that look at data; None: class labels only."""
        return None

    def to(self, device: torch.device) -> Task:
        """The task with the modules among its loss and metrics on `device`: copies of those that are elsewhere."""
        return self

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of sums of an evaluation."""

    @property
    def counts_hits(self) -> bool:
        """Whether training counts correct images (top-1)."""
        return False

    def run(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """Runs the network as the loss does, so that all its layers see what they see in training."""
        return model(inputs)

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        """The loss of every example, float32 (n,), that decisions are made by. `model` is in eval mode."""

    @abstractmethod
    def losses_of(self, outputs: Any, targets: Any) -> torch.Tensor:
        """As `losses`, from the network's outputs. Only for a loss that does not run the network."""

    @abstractmethod
    def training_sum(
        self, outputs: Any, targets: Any, images: int, config: TrainConfig, teacher_outputs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that training minimises, summed over the examples (`images` of them), and the number of correct ones
        (0 if they are not counted), both scalars. `outputs` are those of `trained(model)` in training mode.
        """

    def trained(self, model: nn.Module) -> nn.Module:
        """The module that training runs (and makes distributed) on (inputs,), or (inputs, targets) if `runs_model`."""
        return model

    @abstractmethod
    def sums(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        """What an evaluation adds up over batches and ranks, float64 (width,); the first is the loss."""

    @abstractmethod
    def metrics(self, sums: Sequence[float], images: int) -> Metrics:
        """The metrics from the sums (width,) over all `images`."""

    def trial(self, shape: Sequence[int]) -> tuple[Any, Any]:
        """Inputs and targets of TRIAL_IMAGES examples: the first of the own training data, or noise of `shape` (C, H,
        W).
        """
        if self.data is not None:
            examples = self.data.open("train")
            return examples.load([index % len(examples) for index in range(TRIAL_IMAGES)], 0, 0)
        images = torch.randn(TRIAL_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
        return images, torch.zeros(TRIAL_IMAGES, dtype=torch.int64)

    def check_settings(self, config: TrainConfig) -> None:  # noqa: B027
        """Raises ConfigError if settings of training do not fit the loss."""

    def trial_fault(self, outputs: Any, images: int) -> str:
        """Why the network's outputs in training mode for so many images do not fit the loss; empty if they do."""
        return ""

    def own_parts(self) -> dict[str, Any]:
        """The user's own objects by what messages call them; empty without any."""
        if self.data is None:
            return {}
        return {
            "the data factory": self.data.factory,
            "the data factory's arguments": self.data.arguments,
            "the collate function": self.data.collate,
        }

    def identity(self) -> Mapping[str, Any] | None:
        """What identifies the user's own parts in the journal; None without any."""
        if self.data is None:
            return None
        parts = {"factory": self.data.factory, "arguments": self.data.arguments, "collate": self.data.collate}
        return {"data": {name: identity_of(part) for name, part in parts.items()}}
