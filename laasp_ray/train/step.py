"""One step of the optimizer on a global batch that is cut into a fixed number of parts.

Each part goes through the network alone, so BatchNorm sees the same images together for any number of ranks. A rank
that has several parts adds up their gradients. A group that has lost ranks therefore trains as before, except for the
order in which floating-point numbers are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.data.ordering import derive_seed
from laasp_ray.models.format import in_format_of
from laasp_ray.train.data import PhaseData
from laasp_ray.train.ema import MovingAverage
from laasp_ray.train.mask_enforcement import MaskEnforcer
from laasp_ray.train.precision import autocast


@dataclass(frozen=True)
class Setup:
    """The objects that all epochs of a training phase use. `wrapped` is `model`, made distributed.

    `heartbeat` is called after each piece of work, so that a rank that hangs differs from a slow one.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.SGD
    mask_enforcer: MaskEnforcer
    average: MovingAverage | None
    teacher: nn.Module | None
    data: PhaseData
    config: TrainConfig
    seed: int
    heartbeat: Callable[[], None]


@dataclass
class EpochSums:
    """Sums over the images of this rank: `values` is float64 (2,), the loss and the correct images, on the device.

    `images` is counted here and not on the device, so that no step waits for the device.
    """

    values: torch.Tensor
    images: int = 0

    def reduced(self, reduce: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Loss, correct images and images, float64 (3,), after `reduce` has summed them over the ranks."""
        images = torch.tensor([self.images], dtype=torch.float64, device=self.values.device)
        sums = torch.cat([self.values, images])
        reduce(sums)
        return sums


@dataclass
class PartDraws:
    """The random numbers of each part's dropout: as if a rank of its own drew them, whichever rank has the part."""

    device: torch.device
    states: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    @staticmethod
    def of_epoch(setup: Setup, data_epoch: int) -> PartDraws:
        """The draws at the beginning of an epoch."""
        draws = PartDraws(setup.data.device)
        for part in reversed(setup.data.own_parts):  # a rank with one part goes on from its seed
            torch.manual_seed(derive_seed(setup.seed, f"dropout, epoch {data_epoch}, rank {part}"))
            if len(setup.data.own_parts) > 1:
                draws.states[part] = draws._state()
        return draws

    @contextlib.contextmanager
    def used(self, part: int) -> Iterator[None]:
        """Random numbers in this context are those of `part`."""
        if not self.states:
            yield
            return
        cpu, cuda = self.states[part]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        yield
        self.states[part] = self._state()

    def _state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda


def take_step(
    setup: Setup, batches: Iterator[Batch], images: int, number: int, draws: PartDraws, sums: EpochSums
) -> None:
    """Optimizer step number `number` of the training phase, on a global batch of `images`.

    `batches` gives this rank's parts of it. They are added to `sums`.
    """
    parts = setup.data.own_parts
    setup.optimizer.zero_grad(set_to_none=True)
    buffers: list[torch.Tensor] = []
    for part in parts:
        batch = next(batches)
        setup.heartbeat()
        # DDP reduces the gradients in the last backward pass only.
        together = contextlib.nullcontext() if part == parts[-1] else _alone(setup.wrapped)
        with draws.used(part), together:
            _add_gradients(setup, batch, images, sums)
        if part == 0 and len(parts) > 1:
            buffers = [buffer.clone() for buffer in setup.model.buffers()]
    if buffers:  # BatchNorm's statistics are those of part 0, as they are if every part has a rank
        torch._foreach_copy_(list(setup.model.buffers()), buffers)
    setup.optimizer.step()
    setup.mask_enforcer.apply()
    if setup.average is not None:
        setup.average.update(number)
    setup.heartbeat()


def _add_gradients(setup: Setup, batch: Batch, images: int, sums: EpochSums) -> None:
    """Adds the gradients of the mean loss over `images`, on this part of them."""
    data, task = setup.data, setup.data.task
    pictures = in_format_of(setup.wrapped, batch.images)
    with autocast(setup.config.precision, data.device):
        output = setup.wrapped(pictures, batch.labels) if task.runs_model else setup.wrapped(pictures)
        teacher_outputs = _outputs_of(setup.teacher, pictures)
    losses, correct = task.training_sum(output, batch.labels, len(batch.indices), setup.config, teacher_outputs)
    # DDP averages over ranks. This factor makes it the mean over the global batch for any share of a rank.
    (losses * (data.world / images)).backward()
    sums.values += torch.stack([losses.detach().double(), correct.double()])
    sums.images += len(batch.indices)


def _alone(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which backward passes of a distributed network do not meet the other ranks."""
    no_sync: Callable[[], contextlib.AbstractContextManager[None]] = getattr(wrapped, "no_sync", contextlib.nullcontext)
    return no_sync()


@torch.no_grad()
def _outputs_of(teacher: nn.Module | None, images: Any) -> Any:
    return None if teacher is None else teacher(images)
