"""What losses are measured on and of: the calibration set, the tasks, and networks made ready for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import nn

from laasp_ray.data.examples.nested import map_tensors
from laasp_ray.data.examples.nested import on_device as moved
from laasp_ray.errors import ConfigError, SearchError, UnmaskedError
from laasp_ray.models.device import on_device
from laasp_ray.pruning.compensation import MadeUp, apply_compensated
from laasp_ray.pruning.masking import CannotMask, Mask
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.search.memory import retried
from laasp_ray.search.precision import full_precision
from laasp_ray.tasks import CLASSIFICATION, Classification, Task

Prepare = Callable[[torch.Tensor], torch.Tensor]
CPU = torch.device("cpu")
NO_LABELS = (
    "a criterion or method that looks at class labels (pls) is used with a task of your own, which has none: give the "
    "loss an attribute `responses`, a callable (targets) -> (n, d), or use others (prune.criteria l1, l2, cosine, ...)"
)
NO_MASK = CannotMask("no mask is known")


class Calibration(ABC):
    """What losses are measured on: `batch_size` examples at a time, by the loss of `task`, as input in `memory_format`.

    A frozen dataclass.
    """

    batch_size: int
    memory_format: torch.memory_format
    task: Task

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network has to be."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def to(self, device: torch.device) -> Calibration:
        """The same set on `device`, and with it the modules of its task."""

    @abstractmethod
    def at(self, indices: np.ndarray) -> tuple[Any, Any]:
        """The examples at `indices` (n,) as input of the network, and their labels or targets."""

    @abstractmethod
    def class_labels(self) -> torch.Tensor:
        """The class indices (n,) of all examples. Raises ConfigError for a set without them."""

    def labels_of(self, targets: Any) -> torch.Tensor:
        """What criteria of data get of a batch: its labels (n,), or the responses (n, d) of a task that has some."""
        return targets if self.task.responses is None else self.task.responses(targets)

    @abstractmethod
    def with_format(self, memory_format: torch.memory_format) -> Self:
        """The same set, with inputs in this format."""

    def batches(self) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(self), self.batch_size):
            yield self.at(np.arange(start, min(start + self.batch_size, len(self))))

    def run(self, model: nn.Module, indices: np.ndarray) -> None:
        """Runs the network on the examples at `indices`, as the loss does."""
        self.task.run(model, *self.at(indices))


@dataclass(frozen=True)
class CalibrationSet(Calibration):
    """The images that losses are measured on: (n, C, H, W), any dtype, and labels (n,) int64.

    `prepare` turns a batch of them into the network's input (uint8 pixels into normalised floats, for example). Images
    are converted to `memory_format`. Channels last, if the network can run in it, is 10 to 30% faster, also on CPUs.
    """

    images: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    prepare: Prepare | None = None
    memory_format: torch.memory_format = torch.channels_last
    task: Task = CLASSIFICATION

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.images) == 0:
            raise SearchError(
                f"the calibration set has {len(self.images)} images and {len(self.labels)} labels: "
                "give as many of one as of the other, and at least one"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device) -> CalibrationSet:
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, task=self.task.to(device))

    def class_labels(self) -> torch.Tensor:
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            raise ConfigError(NO_LABELS)
        return self.labels

    def with_format(self, memory_format: torch.memory_format) -> Self:
        return replace(self, memory_format=memory_format)

    def at(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The images at `indices` (n,) as input of the network, and their labels."""
        chosen = on_device(torch.as_tensor(indices), self.labels.device)
        images = self.images[chosen]
        images = images if self.prepare is None else self.prepare(images)
        return in_format(images, self.memory_format), self.labels[chosen]


@dataclass(frozen=True)
class ExampleSet(Calibration):
    """Drawn `examples` (n) of the data set of `task`, which collates them to batches."""

    examples: Sequence[Any]
    batch_size: int
    task: Task
    memory_format: torch.memory_format = torch.channels_last
    on: torch.device = CPU

    @property
    def device(self) -> torch.device:
        return self.on

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device) -> ExampleSet:
        return replace(self, on=device, task=self.task.to(device))

    def at(self, indices: np.ndarray) -> tuple[Any, Any]:
        places = [int(index) for index in indices]
        assert self.task.data is not None
        pair = self.task.data.collated([self.examples[place] for place in places], places)
        inputs, targets = moved(pair, self.on)
        return map_tensors(inputs, lambda tensor: in_format(tensor, self.memory_format)), targets

    def class_labels(self) -> torch.Tensor:
        if isinstance(self.task, Classification):
            return torch.cat([targets for _, targets in self.batches()])
        raise ConfigError(NO_LABELS)

    def with_format(self, memory_format: torch.memory_format) -> Self:
        return replace(self, memory_format=memory_format)


@dataclass(frozen=True)
class LossTask:
    """A prune whose loss is to be measured. Errors call it `name`. With an empty step it is the current network.

    `mask` has the same effect as `step` without cutting, or is the reason why there is no mask. `made_up` says how the
    layers that read the removed channels make up for them; those that it does not name do not.
    """

    name: str
    step: Plan
    mask: Mask | CannotMask = NO_MASK
    made_up: MadeUp = field(default_factory=dict, compare=False)

    @property
    def unpruned(self) -> bool:
        """Whether nothing is removed."""
        return self.step.is_empty and not (isinstance(self.mask, Mapping) and self.mask)


def in_format(images: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Converts images (n, C, H, W) to a memory format. Other inputs are unchanged."""
    return images.contiguous(memory_format=memory_format) if images.ndim == 4 else images


def ready(
    model: nn.Module, device: torch.device, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    """Prepares `model` for `measure`, in place: on `device`, in eval mode, weights of 4-D inputs in `memory_format`."""
    model = model.to(device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)
    return model


AnyCalibration = TypeVar("AnyCalibration", bound=Calibration)


@full_precision()
def ready_with(model: nn.Module, calibration: AnyCalibration) -> tuple[nn.Module, AnyCalibration]:
    """Prepares `model` for `calibration`. Both get the fastest memory format that the network can run in.

    A network with `x.view(len(x), -1)` after a convolution cannot run channels last.
    """
    model = ready(model, calibration.device, calibration.memory_format)
    try:
        _try(model, calibration)
    except RuntimeError as error:
        if "view" not in str(error) or calibration.memory_format == torch.contiguous_format:
            raise
        return ready_with(model, calibration.with_format(torch.contiguous_format))
    return model, calibration


@torch.inference_mode()
def _try(model: nn.Module, calibration: Calibration) -> None:
    retried(lambda: calibration.run(model, np.arange(1)), "one image, in the network,")


def pruned_copy(model: nn.Module, task: LossTask) -> nn.Module:
    """The network after a task's prune. Unchanged tensors are shared, because inference does not write to them.

    Raises UnmaskedError for a task that has a mask but no plan; a copy would be the unpruned network.
    """
    if task.step.is_empty and not task.unpruned:
        raise UnmaskedError(f"{task.name} came without the plan to cut it by, and its mask cannot be used here")
    pruned = clone_sharing_parameters(model)
    apply_compensated(pruned, task.step, task.made_up)
    return pruned
