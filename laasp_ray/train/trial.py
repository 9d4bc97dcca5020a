"""Tries one training step before a run, because a network may behave differently in training mode and in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.suitable import not_finite, shown
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.tasks.check import trial_on


@dataclass
class Tried:
    """The result of a trial step. `fault` is the error, or empty. `unused` names parameters without a gradient."""

    fault: str = ""
    unused: list[str] = field(default_factory=list)


def try_step(model: nn.Module, shape: Sequence[int], config: TrainConfig, task: Task = CLASSIFICATION) -> Tried:
    """Trains `model`, in place, for one step on two random images of `shape`, or on two examples of the task's own
    data, as a run does: loss, gradients, SGD.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return Tried("no parameter of the network requires a gradient; set requires_grad on what is to train")
    device = next(model.parameters()).device
    task = task.to(device)
    inputs, targets = trial_on(task, shape, device)
    running = _Running(model)
    with random_state_kept(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        try:
            return _step(model.train(), inputs, targets, config, task)
        except Exception as error:  # the network's own code may raise any error, and the error is the result
            return Tried(f"{running.place} fails in training mode ({type(error).__name__}: {_first_line(error)})")
        finally:
            running.close()


def _step(model: nn.Module, inputs: Any, targets: Any, config: TrainConfig, task: Task) -> Tried:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    images, trained = len(inputs), task.trained(model)
    output = trained(inputs, targets) if task.runs_model else trained(inputs)
    fault = task.trial_fault(output, images)
    if fault:
        return Tried(fault)
    if targets is None:  # noise has any labels
        targets = torch.arange(images, device=output.device) % output.shape[1]
    loss = task.training_sum(output, targets, images, config)[0].sum() / images
    if not loss.requires_grad:
        return Tried(
            "its outputs in training mode have no gradient; something in its forward detaches them (no_grad, "
            "inference_mode or detach): take that out"
        )
    if not torch.isfinite(loss):
        return Tried(f"the loss of its first step is {loss.item()}; check its weights and what it computes")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    broken = not_finite(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if broken:
        return Tried(f"the gradients of {shown(broken)} are not finite after its first step", unused)
    optimizer.step()
    return Tried("", unused)


def unused_parameters(
    model: nn.Module, shape: Sequence[int], config: TrainConfig, task: Task = CLASSIFICATION
) -> list[str]:
    """The names of the parameters that get no gradient in a training step. Works on a copy."""
    return try_step(deep_copy(model), shape, config, task).unused


class _Running:
    """Tracks which module is running. Hooks on all modules keep a stack, and its top is where an error occurred."""

    def __init__(self, model: nn.Module) -> None:
        self._stack: list[str] = []
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def _leave(self) -> None:
        self._stack.pop()

    @property
    def place(self) -> str:
        inner = next((name for name in reversed(self._stack) if name), "")
        return f"module {inner}" if inner else "it"

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
