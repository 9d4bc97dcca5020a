"""Checks of a task on two real examples, before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from laasp_ray.data.examples.nested import on_device
from laasp_ray.errors import ConfigError, LaaspError
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.tasks.base import TRIAL_IMAGES, Task
from laasp_ray.tasks.classification import Classification, check_labels_fit
from laasp_ray.tasks.own import OwnLossTask

BatchAt = Callable[[Sequence[int]], tuple[Any, Any]]
"""Gives the inputs and targets of the examples at some places."""
_TOLERANCE = 1e-3
"""The largest allowed difference of an example's loss alone and in a batch, relative to the largest loss."""


@random_state_kept()
def check_task(task: Task, model: nn.Module, shape: Sequence[int]) -> None:
    """Raises ConfigError or DataError, naming the part and the remedy, if data, loss or metrics do not work.

    The network, in eval mode, gets the first examples of both splits. Its loss must be one finite number for each
    example, which does not depend on the others of the batch, and must not change the network. `shape` (C, H, W) is
    that of an input. Classification of images is not checked here.
    """
    if task.data is None and isinstance(task, Classification):
        return
    network = deep_copy(model).eval()  # a module may store its inputs
    _check_inputs(task, task.trial(shape)[0], shape, "training")
    check_losses(task, network, _batch_at(task, shape))
    if task.data is not None:
        test = task.data.open("test")
        inputs, targets = test.load([index % len(test) for index in range(TRIAL_IMAGES)], 0, 0)
        _check_inputs(task, inputs, shape, "test")
        with torch.inference_mode():
            _sums(task, network, inputs, targets)


def _batch_at(task: Task, shape: Sequence[int]) -> BatchAt:
    """The first training examples, or noise of `shape`."""
    if task.data is None:
        inputs, targets = task.trial(shape)
        return lambda places: (inputs[list(places)], targets[list(places)])
    train = task.data.open("train")
    return lambda places: train.load([place % len(train) for place in places], 0, 0)


@torch.inference_mode()
def check_losses(task: Task, network: nn.Module, batch_at: BatchAt) -> None:
    """Raises ConfigError, naming the loss and the remedy, if the losses of the first examples cannot be compared.

    `network` is in eval mode, and is a copy: the loss may change it. See `check_task`.
    """
    inputs, targets = batch_at(range(TRIAL_IMAGES))
    if isinstance(task, Classification):
        outputs = _tried(task, lambda: network(inputs))
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
            raise ConfigError(
                "the network must give one tensor of shape (images, classes), or the run needs a loss of its own for "
                "what it gives"
            )
        check_labels_fit(targets, outputs)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if torch.is_tensor(tensor)}
    losses = _tried(task, lambda: task.losses(network, inputs, targets))
    changed = [
        name for name, tensor in network.state_dict().items() if name in before and _differ(tensor, before[name])
    ]
    if changed:
        raise ConfigError(
            f"{_named(task)} changes the network ({', '.join(changed[:3])}) in eval mode: it must not put modules into "
            "training mode, nor change weights or statistics"
        )
    if any(module.training for module in network.modules()):
        raise ConfigError(f"{_named(task)} leaves the network in training mode: have it keep the mode that it finds")
    if not bool(torch.isfinite(losses).all()):
        raise ConfigError(
            f"{_named(task)} gave {losses.tolist()} for the first {len(losses)} training examples, must be finite: "
            "look at the examples' targets, at logarithms and divisions in the loss, and at the network's weights"
        )
    _check_alone(task, network, losses, batch_at)
    _sums(task, network, inputs, targets)


def _check_alone(task: Task, network: nn.Module, losses: torch.Tensor, batch_at: BatchAt) -> None:
    """Raises ConfigError if an example's loss depends on the others of its batch: decisions compare them."""
    for place in range(len(losses)):
        inputs, targets = batch_at([place])
        alone = float(_tried(task, lambda: task.losses(network, inputs, targets))[0])  # noqa: B023
        together = float(losses[place])
        if abs(alone - together) > _TOLERANCE * max(float(losses.abs().max()), 1e-6):
            raise ConfigError(
                f"{_named(task)} gave {together:.6g} for training example {place} in a batch of {len(losses)}, "
                f"{alone:.6g} for it alone: the loss of an example must not depend on the others of its batch; do not "
                "divide by a count over the batch"
            )


def _sums(task: Task, network: nn.Module, inputs: Any, targets: Any) -> None:
    """Tries the evaluation on one batch, metrics included."""
    sums = _tried(task, lambda: task.sums(network, inputs, targets))
    if isinstance(task, OwnLossTask):
        task.metrics((sums + sums).tolist(), 2 * TRIAL_IMAGES)


def _check_inputs(task: Task, inputs: Any, shape: Sequence[int], split: str) -> None:
    if isinstance(inputs, torch.Tensor):
        if tuple(inputs.shape[1:]) != tuple(shape) or not inputs.is_floating_point():
            raise ConfigError(
                f"the {split} data are collated to inputs of shape {tuple(inputs.shape)} and type {inputs.dtype}, must "
                f"be floats (n, {', '.join(map(str, shape))}): model.input_shape is {tuple(shape)}; have the data set "
                "give such inputs, or set model.input_shape"
            )
    elif not task.runs_model:
        raise ConfigError(
            f"the {split} data are collated to inputs that are a {type(inputs).__name__}, must be one tensor: only a "
            "loss of (model, batch), which runs the network itself, takes anything else"
        )


def _tried(task: Task, call: Any) -> Any:
    try:
        return call()
    except LaaspError:
        raise
    except Exception as error:  # a user's code can raise any error
        raise ConfigError(
            f"{_named(task)} fails on the first {TRIAL_IMAGES} examples ({type(error).__name__}: {error})"
        ) from error


def _named(task: Task) -> str:
    return task.named if isinstance(task, OwnLossTask) else "the network or its cross-entropy"


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(one.nan_to_num(), other.nan_to_num())


def trial_on(task: Task, shape: Sequence[int], device: torch.device) -> tuple[Any, Any]:
    """The trial batch of a task on `device`."""
    inputs, targets = on_device(task.trial(shape), device)
    return inputs, targets
