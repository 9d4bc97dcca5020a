"""Tasks with a loss of the user's own: of the network's outputs, or one that runs the network itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.examples.nested import in_float32
from laasp_ray.errors import ConfigError, LaaspError, is_out_of_memory
from laasp_ray.models.copying import deep_copy
from laasp_ray.records import Metrics
from laasp_ray.tasks.base import Task
from laasp_ray.tasks.identity import identity_of
from laasp_ray.tasks.metrics import Mean, Metric

_TAKEN = ("loss", "top1", "top5", "flops_reduction")
"""What runs, tables, TensorBoard and pages call their own figures."""
_BEST = "best_"
"""With it begins what `--repeats` calls the figure of the best epoch: best_ and the name of the primary metric."""


@dataclass(frozen=True)
class OwnLossTask(Task):
    """What both kinds share. `metrics_by_name`: the first is the primary one; without any the loss is."""

    loss: Callable[..., torch.Tensor] = field(kw_only=True)
    metrics_by_name: Mapping[str, Metric] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for name in self.metrics_by_name:
            if name in _TAKEN or name.startswith(_BEST):
                raise ConfigError(
                    f"the metric {name!r} has a name of the run's own figures ({', '.join(_TAKEN)}, and all that begin "
                    f"with {_BEST}), whose places it would take: give it another one, such as 'my_{name}'"
                )

    def to(self, device: torch.device) -> Self:
        metrics = {name: _on(metric, device) for name, metric in self.metrics_by_name.items()}
        return replace(self, loss=_on(self.loss, device), metrics_by_name=metrics)

    @property
    def primary(self) -> tuple[str, Literal["higher", "lower"]]:
        for name, metric in self.metrics_by_name.items():
            return name, "higher" if metric.higher_is_better else "lower"
        return "loss", "lower"

    @property
    def responses(self) -> Callable[[Any], torch.Tensor] | None:
        """By the loss's attribute `responses`. Raises ConfigError, when called, for anything but numbers (n, d)."""
        function = getattr(self.loss, "responses", None)
        return None if function is None else functools.partial(_responses, function, self.named)

    @property
    def width(self) -> int:
        return 1 + sum(metric.width for metric in self.metrics_by_name.values())

    def checked(self, values: Any, images: int) -> torch.Tensor:
        """`values` as float32 if they are one number for each of `images` examples. Raises ConfigError otherwise."""
        if not isinstance(values, torch.Tensor):
            raise ConfigError(f"{self.named} gave a {type(values).__name__}, must give a tensor of shape ({images},)")
        if tuple(values.shape) == (images,) and values.is_floating_point():
            return values.float()
        given = f"a tensor of shape {tuple(values.shape)} and type {values.dtype}"
        hint = ""
        if values.ndim == 0:
            hint = ": it is a mean or a sum over the batch, take reduction='none' and the mean over all but the first"
        elif values.ndim > 1 and len(values) == images:
            hint = ": take the mean (or the sum) over all dimensions but the first, values.flatten(1).mean(1)"
        raise ConfigError(
            f"{self.named} gave {given}, must give floats of shape ({images},), one for each example{hint}"
        )

    @property
    def named(self) -> str:
        """The loss in messages."""
        return f"the loss {getattr(self.loss, '__qualname__', type(self.loss).__name__)}"

    def metric_sums(self, outputs: Any, targets: Any, device: torch.device) -> list[torch.Tensor]:
        """The sums of every metric, float64. Raises ConfigError, naming the metric, if one fails."""
        found = []
        for name, metric in self.metrics_by_name.items():
            try:
                sums = metric.sums(outputs, targets)
            except Exception as error:  # a user's code can raise any error
                if isinstance(error, LaaspError) or is_out_of_memory(error):
                    raise
                raise ConfigError(f"the metric {name!r} failed: {type(error).__name__}: {error}") from error
            if not isinstance(sums, torch.Tensor) or tuple(sums.shape) != (metric.width,):
                given = f"shape {tuple(sums.shape)}" if isinstance(sums, torch.Tensor) else f"a {type(sums).__name__}"
                raise ConfigError(
                    f"the metric {name!r} gave sums of {given}, must give a tensor ({metric.width},), as its width says"
                )
            found.append(sums.detach().to(device, torch.float64))
        return found

    def metrics(self, sums: Sequence[float], images: int) -> Metrics:
        values, start = {}, 1
        for name, metric in self.metrics_by_name.items():
            part = torch.tensor(list(sums[start : start + metric.width]), dtype=torch.float64)
            start += metric.width
            try:
                values[name] = float(metric.value(part))
            except Exception as error:  # a user's code can raise any error
                raise ConfigError(
                    f"the metric {name!r} failed on the sums {part.tolist()}: {type(error).__name__}: {error}"
                ) from error
        return Metrics(loss=sums[0] / images, images=images, values=values, better=self.primary[1])

    def own_parts(self) -> dict[str, Any]:
        metrics = {f"the metric {name!r}": metric for name, metric in self.metrics_by_name.items()}
        return {**super().own_parts(), "the loss": self.loss, **metrics}

    def identity(self) -> Mapping[str, Any]:
        metrics = {name: identity_of(metric) for name, metric in self.metrics_by_name.items()}
        found = {**(super().identity() or {}), "loss": identity_of(self.loss), "metrics": metrics}
        return found | ({"order_of_metrics": ", ".join(metrics)} if len(metrics) > 1 else {})

    def check_settings(self, config: TrainConfig) -> None:
        if config.label_smoothing:
            raise ConfigError(
                f"train.label_smoothing is {config.label_smoothing:g}, which is of the built-in cross-entropy: with "
                f"{self.named} of your own leave it out, and smooth inside the loss"
            )


@dataclass(frozen=True)
class OutputLossTask(OwnLossTask):
    """A loss of (outputs, targets), where outputs are what the network gives for the inputs.

    An attribute `distillation` of the loss, a callable (outputs, teacher_outputs, targets) -> (n,), allows
    `train.distill`.
    """

    def losses(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        return self.checked(self.loss(in_float32(model(inputs)), targets), len(inputs))

    def losses_of(self, outputs: Any, targets: Any) -> torch.Tensor:
        return self.checked(self.loss(in_float32(outputs), targets), len(outputs))

    def training_sum(
        self, outputs: Any, targets: Any, images: int, config: TrainConfig, teacher_outputs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = in_float32(outputs)
        losses = self.checked(self.loss(outputs, targets), images)
        if teacher_outputs is not None:
            imitation = self.loss.distillation(outputs, in_float32(teacher_outputs), targets)  # type: ignore[attr-defined]
            losses = (1 - config.distill) * losses + config.distill * self.checked(imitation, images)
        total = losses.sum()
        return total, torch.zeros_like(total, dtype=torch.int64)

    def sums(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        outputs = in_float32(model(inputs))
        losses = self.checked(self.loss(outputs, targets), len(inputs))
        total = losses.double().sum().reshape(1)
        return torch.cat([total, *self.metric_sums(outputs, targets, losses.device)])

    def check_settings(self, config: TrainConfig) -> None:
        super().check_settings(config)
        if config.distill and not callable(getattr(self.loss, "distillation", None)):
            raise ConfigError(
                f"train.distill is {config.distill:g}, but {self.named} does not say how to imitate a teacher: give it "
                "an attribute `distillation`, a callable (outputs, teacher_outputs, targets) -> one value per example, "
                "or leave train.distill out"
            )


@dataclass(frozen=True)
class ModelLossTask(OwnLossTask):
    """A loss of (model, batch) that runs the network itself; batch is the pair (inputs, targets).

    The search calls it with the network in eval mode. It must not change the network. Metrics get `model(inputs)` in
    eval mode as outputs.
    """

    @property
    def runs_model(self) -> bool:
        return True

    def run(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        return self.loss(model, (inputs, targets))

    def losses(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        return self.checked(self.loss(model, (inputs, targets)), len(inputs))

    def losses_of(self, outputs: Any, targets: Any) -> torch.Tensor:
        raise AssertionError("a loss that runs the network has no outputs to be computed from")

    def trained(self, model: nn.Module) -> nn.Module:
        return LossModule(model, self)

    def training_sum(
        self, outputs: Any, targets: Any, images: int, config: TrainConfig, teacher_outputs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = outputs.sum()
        return total, torch.zeros_like(total, dtype=torch.int64)

    def sums(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        losses = self.losses(model, inputs, targets)
        outputs = in_float32(model(inputs)) if self.metrics_by_name else None
        total = losses.double().sum().reshape(1)
        return torch.cat([total, *self.metric_sums(outputs, targets, losses.device)])

    def check_settings(self, config: TrainConfig) -> None:
        super().check_settings(config)
        if config.distill:
            raise ConfigError(
                f"train.distill is {config.distill:g}, but {self.named} runs the network itself, and distillation "
                "needs a loss of (outputs, targets): leave train.distill out"
            )


class LossModule(nn.Module):
    """The network with its loss as one module, so that DDP sees one forward pass whatever the loss calls."""

    def __init__(self, model: nn.Module, task: ModelLossTask) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, inputs: Any, targets: Any) -> torch.Tensor:
        """The losses (n,) of a batch."""
        return self._task.losses(self.model, inputs, targets)


def _responses(function: Callable[[Any], torch.Tensor], named: str, targets: Any) -> torch.Tensor:
    try:
        found = function(targets)
    except Exception as error:  # a user's code can raise any error
        raise ConfigError(f"`responses` of {named} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, torch.Tensor) or found.ndim not in (1, 2) or not found.numel():
        given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(f"`responses` of {named} gave {given}, must give numbers of shape (n, d), a row an example")
    found = found.double().reshape(len(found), -1)
    if not bool(found.isfinite().all()):
        raise ConfigError(f"`responses` of {named} gave values that are not finite: give numbers for every example")
    return found


def _on(part: Any, device: torch.device) -> Any:
    """A loss or a metric, or the function of a `Mean`, on `device`: a copy if it is a module with tensors elsewhere, so
    that the user's own stays where it is.
    """
    if isinstance(part, Mean):
        return replace(part, function=_on(part.function, device))
    if not isinstance(part, nn.Module):
        return part
    tensors = (*part.parameters(), *part.buffers())
    return part if all(tensor.device == device for tensor in tensors) else deep_copy(part).to(device)
