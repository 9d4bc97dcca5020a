"""A training phase in plain PyTorch: some epochs of SGD, each yielded with its weights, then an evaluation.

It runs alone or under torch.distributed, and uses neither Ray nor the store. The order and augmentation of an epoch are
functions of the seed and the epoch's number. So a training phase that is resumed after `done` epochs gives the same
result as one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.data.ordering import epoch_batches, eval_batches, rank_share
from laasp_ray.errors import TrainingError
from laasp_ray.models.format import in_format_of
from laasp_ray.models.suitable import not_finite
from laasp_ray.records import Metrics, Place
from laasp_ray.train.data import EvaluationData, PhaseData
from laasp_ray.train.ema import MovingAverage
from laasp_ray.train.feeding import fed
from laasp_ray.train.mask_enforcement import MaskEnforcer
from laasp_ray.train.step import EpochSums, PartDraws, Setup, take_step

_MOMENTUM, _WEIGHTS = "momentum/", "weights/"
_TESTED_PHASES = ("train", "final")


@dataclass(frozen=True)
class EpochPlan:
    """`epoch` is the number in the schedule, for people. `data_epoch` determines the order and augmentation of the
    images.
    """

    epoch: int
    data_epoch: int
    learning_rate: float


@dataclass(frozen=True)
class TrainingPhase:
    """A command to a trainer: train these epochs, without the first `done`, which are finished. No epochs: only
    evaluate.

    `excluded` names images that were found unreadable before, and `places` says where they were. `masks` (parameter ->
    packed mask, see pruning/sparsity/groups.py) mark the weights that are zero and stay zero.
    """

    number: int
    phase: str
    epochs: tuple[EpochPlan, ...] = ()
    done: int = 0
    excluded: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    masks: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch. `position` counts the training phase's epochs from 0. All tensors are on the CPU.

    `tensors` are the network's; with `train.ema` they are the average's. `optimizer_state` is the other state that the
    next epoch of the training phase needs: `momentum/PARAMETER`, and with `train.ema` the weights being averaged,
    `weights/NAME`. `loss` is the training loss without weight decay. `loss` and `top1` are over the training images as
    they were seen in the epoch, reduced over all ranks; `top1` is None for a loss of the user's own. `metrics` are
    those of `tensors` on the test images, if they were evaluated after this epoch. That evaluation took `test_seconds`,
    which `seconds` does not include.
    """

    position: int
    plan: EpochPlan
    loss: float
    top1: float | None
    images: int
    seconds: float
    tensors: Mapping[str, torch.Tensor]
    optimizer_state: Mapping[str, torch.Tensor]
    unreadable: tuple[str, ...]
    metrics: Metrics | None = None
    test_seconds: float = 0.0


@dataclass(frozen=True)
class PhaseResult:
    """The evaluation on the test images at the end of a training phase. `loader` is the loader that decoded them."""

    metrics: Metrics
    seconds: float
    unreadable: tuple[str, ...]
    loader: str


def run_training_phase(
    model: nn.Module,
    optimizer_state: Mapping[str, torch.Tensor],
    training_phase: TrainingPhase,
    *,
    data: PhaseData,
    config: TrainConfig,
    seed: int,
    teacher: nn.Module | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    heartbeat: Callable[[], None] = lambda: None,
) -> Iterator[EpochResult | PhaseResult]:
    """Trains `model`, which is on `data.device`, in place. `optimizer_state` is that of the previous epoch; empty: a
    new one.

    `teacher`, on the same device, is imitated as `config.distill` says. `wrap` makes the network distributed.
    `heartbeat` is called at least twice a step. Raises TrainingError, naming the epoch, if the loss or the weights are
    not finite.
    """
    if data.device.type == "cuda":
        # With autotuning a resumed run differs in the last digits, because it may choose other kernels.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not config.autotune, config.autotune
    mask_enforcer = MaskEnforcer(model, training_phase.masks)
    mask_enforcer.apply()
    remaining = training_phase.epochs[training_phase.done :]
    if remaining:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                "no parameter of the network requires a gradient: set requires_grad on what is to train"
            )
        average = MovingAverage(model, config.ema) if config.ema else None
        weights = _part(optimizer_state, _WEIGHTS)
        if weights:  # `model` holds the averages here
            model.load_state_dict(weights)
        # An evaluation needs neither. Both refer to the network's parameters as they are now.
        wrapped, optimizer = (
            wrap(data.task.trained(model)),
            _optimizer(model, config, _part(optimizer_state, _MOMENTUM)),
        )
        if config.compile:
            # An epoch has batches of two sizes at most. Kernels for any size would be slower than two sets of them.
            wrapped = cast(nn.Module, torch.compile(wrapped, dynamic=False))
        if teacher is not None:
            teacher.eval()
        setup = Setup(model, wrapped, optimizer, mask_enforcer, average, teacher, data, config, seed, heartbeat)
        for position, plan in enumerate(remaining, training_phase.done):
            done = _train_epoch(setup, position, plan)
            yield _test_epoch(setup, done) if _is_tested(training_phase, position, config) else done
        if average is not None:
            model.load_state_dict(average.tensors)
    started = time.perf_counter()
    metrics = evaluate(model, data, heartbeat)
    yield PhaseResult(metrics, time.perf_counter() - started, data.take_unreadable(), data.test_loader.name)


def _is_tested(training_phase: TrainingPhase, position: int, config: TrainConfig) -> bool:
    """Whether the epoch is evaluated. The last one is not: the evaluation at the end of the training phase
    follows it.
    """
    last = position + 1 == len(training_phase.epochs)
    return (
        training_phase.phase in _TESTED_PHASES and not last and config.is_tested(training_phase.epochs[position].epoch)
    )


def _part(optimizer_state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in optimizer_state.items() if name.startswith(prefix)}


def _optimizer(model: nn.Module, config: TrainConfig, momentum: Mapping[str, torch.Tensor]) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=all(parameter.is_cuda for parameter in model.parameters()) or None,
    )
    for name, parameter in model.named_parameters():
        if name in momentum:
            # The buffer needs the parameter's memory format: mixed formats use the optimizer's slow path.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])
    return optimizer


def _train_epoch(setup: Setup, position: int, plan: EpochPlan) -> EpochResult:
    started = time.perf_counter()
    data, config, seed = setup.data, setup.config, setup.seed
    draws = PartDraws.of_epoch(setup, plan.data_epoch)
    for group in setup.optimizer.param_groups:
        group["lr"] = plan.learning_rate
    setup.model.train()
    batches = epoch_batches(
        data.train_images, batch_size=config.global_batch(data.parts), seed=seed, epoch=plan.data_epoch
    )
    totals = EpochSums(torch.zeros(2, dtype=torch.float64, device=data.device))
    shares = [rank_share(batch, part, data.parts) for batch in batches for part in data.own_parts]
    loader = data.train_loader
    batches_ahead = fed(loader.epoch(shares, plan.data_epoch), data.device, ahead=loader.in_background)
    with contextlib.closing(batches_ahead) as given:
        loaded = _checked(given, shares, plan)
        for number, images in enumerate(map(len, batches), position * len(batches) + 1):
            take_step(setup, loaded, images, number, draws, totals)
    sums = totals.reduced(_reduce)
    _agree_on_buffers(setup)
    average = setup.average
    tensors = _on_cpu(setup.model.state_dict() if average is None else average.tensors)
    _check_finite(sums, setup.model, tensors, plan)
    return EpochResult(
        position=position,
        plan=plan,
        loss=float(sums[0] / sums[2]),
        top1=float(sums[1] / sums[2]) if data.task.counts_hits else None,
        images=int(sums[2]),
        seconds=time.perf_counter() - started,
        tensors=tensors,
        optimizer_state=_optimizer_state(setup),
        unreadable=data.take_unreadable(),
    )


def _checked(loaded: Iterator[Batch], shares: Sequence[np.ndarray], plan: EpochPlan) -> Iterator[Batch]:
    """The loaded batches. Raises TrainingError if the images of `shares` are not theirs."""
    for share in shares:
        batch = next(loaded, None)  # a batch without readable images is skipped
        if batch is None or not set(batch.indices.tolist()) <= set(share.tolist()):
            raise TrainingError(f"epoch {plan.epoch}: not one image of a batch of {len(share)} could be read")
        yield batch


def _test_epoch(setup: Setup, done: EpochResult) -> EpochResult:
    """Adds the metrics of the epoch's tensors to `done`. The network keeps its weights, and is left in eval mode."""
    started = time.perf_counter()
    model, average = setup.model, setup.average
    if average is None:
        metrics = evaluate(model, setup.data, setup.heartbeat)
    else:
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(average.tensors)
        metrics = evaluate(model, setup.data, setup.heartbeat)
        model.load_state_dict(own)
    seconds = time.perf_counter() - started
    unreadable = (*done.unreadable, *setup.data.take_unreadable())
    return replace(done, metrics=metrics, test_seconds=seconds, unreadable=unreadable)


def _optimizer_state(setup: Setup) -> dict[str, torch.Tensor]:
    state = setup.optimizer.state
    optimizer_state = {
        _MOMENTUM + name: state[parameter]["momentum_buffer"]
        for name, parameter in setup.model.named_parameters()
        if "momentum_buffer" in state[parameter]
    }
    if setup.average is not None:
        optimizer_state |= {_WEIGHTS + name: tensor for name, tensor in setup.model.state_dict().items()}
    return _on_cpu(optimizer_state)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, data: EvaluationData, heartbeat: Callable[[], None] = lambda: None) -> Metrics:
    """The loss and the task's metrics on the test images, in float32. Each image counts once over all ranks."""
    model.eval()
    task = data.task
    sums = torch.zeros(task.width, dtype=torch.float64, device=data.device)
    images = 0
    shares = eval_batches(data.test_images, batch_size=data.share, rank=data.rank, world=data.world)
    loader = data.test_loader
    with contextlib.closing(fed(loader.epoch(shares), data.device, ahead=loader.in_background)) as given:
        for batch in given:
            sums += task.sums(model, in_format_of(model, batch.images), batch.labels)
            images += len(batch.indices)  # counted here and not on the device, which is not waited for
            heartbeat()
    sums = torch.cat([sums, torch.tensor([images], dtype=torch.float64, device=data.device)])
    _reduce(sums)
    images = int(sums[-1])
    if images == 0:
        raise TrainingError("not one test image could be read")
    return task.metrics([float(value) for value in sums[:-1]], images)


def _agree_on_buffers(setup: Setup) -> None:
    """Copies rank 0's BatchNorm statistics to all ranks: DDP does so before a training step, but not after the last.

    The averages of these statistics differ between ranks, too. The averages of the weights are equal, as the weights
    are.
    """
    if dist.is_available() and dist.is_initialized():
        for buffer in [*setup.model.buffers(), *(setup.average.buffers() if setup.average is not None else ())]:
            dist.broadcast(buffer, 0)


def _reduce(sums: torch.Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)


def _check_finite(sums: torch.Tensor, model: nn.Module, tensors: Mapping[str, torch.Tensor], plan: EpochPlan) -> None:
    if not torch.isfinite(sums).all():
        raise TrainingError(
            f"the training loss of epoch {plan.epoch} (learning rate {plan.learning_rate:g}) is not finite"
        )
    broken = not_finite(model, tensors)
    if broken:
        raise TrainingError(
            f"after epoch {plan.epoch} (learning rate {plan.learning_rate:g}) {len(broken)} tensors are not finite: "
            + ", ".join(broken[:3])
        )
