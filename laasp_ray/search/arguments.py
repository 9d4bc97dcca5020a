"""Checks the arguments of `rank` before anything expensive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from laasp_ray.config import SearchConfig
from laasp_ray.data.examples.calibration import draw_calibration_examples
from laasp_ray.errors import ConfigError, LaaspError, describe_error, is_out_of_memory
from laasp_ray.models.copying import deep_copy
from laasp_ray.search.evaluate import (
    AnyCalibration,
    Calibration,
    CalibrationSet,
    ExampleSet,
    Prepare,
    ready_with,
)
from laasp_ray.tasks import Classification, Task
from laasp_ray.tasks.check import check_losses

EXAMPLES = 1000
"""The examples that `rank` draws of a data set, unless it is given another number."""
_KINDS_OF_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_search(batch_size: int, memory_mb: int, *, racing: bool, racing_error: float) -> SearchConfig:
    """The settings of the search. Raises ConfigError for values that are out of range or not whole numbers."""
    for name, value in (("batch_size", batch_size), ("memory_mb", memory_mb)):
        if type(value) is not int:
            raise ConfigError(f"{name} is {value!r}, must be a whole number")
    return SearchConfig(
        batch_size=batch_size, memory_mb=memory_mb, racing="on" if racing else "off", racing_error=racing_error
    )


def listed(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """The values of an argument that takes several names. Raises ConfigError for a single one that is in no list."""
    if isinstance(values, str):
        raise ConfigError(f"{name} is {values!r}, must be a list: [{values!r}]")
    return tuple(values)


def calibration_of(
    model: nn.Module,
    images: torch.Tensor | None,
    labels: torch.Tensor | None,
    task: Task,
    *,
    examples: int,
    batch_size: int,
    prepare: Prepare | None,
    seed: int,
) -> Calibration:
    """What losses are measured on: the images and their labels or targets, or examples drawn of the data of `task`, on
    the device of `model`.

    Raises ConfigError if both or neither are given, or if they do not fit; DataError if examples cannot be read.
    """
    if (images is None and labels is None) == (task.data is None):
        given = "neither images and labels nor data" if task.data is None else "images and labels, and data too"
        raise ConfigError(
            f"rank is given {given}: give one of them, rank(model, images, labels) or rank(model, data=...)"
        )
    if task.data is None:
        images, labels = checked_data(images, labels, task)
        return CalibrationSet(images, labels, batch_size, prepare, task=task.to(images.device))
    if prepare is not None:
        raise ConfigError("rank is given prepare, which is of images, and data: have the data set prepare its inputs")
    if type(examples) is not int or examples < 1:
        raise ConfigError(f"examples is {examples!r}, must be a whole number, at least 1")
    drawn = draw_calibration_examples(task.data.open("train"), images=examples, seed=seed)
    tensors = (*model.parameters(), *model.buffers())
    return ExampleSet(drawn.examples, batch_size, task).to(tensors[0].device if tensors else torch.device("cpu"))


def checked_data(
    images: torch.Tensor | None, labels: torch.Tensor | None, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and labels as int64 or targets as they are. Raises ConfigError for values that are not tensors or have a
    wrong shape, dtype or device.
    """
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{name} is a {type(value).__name__}, must be a tensor: collect what a loader gives, with torch.cat"
            )
    assert images is not None and labels is not None
    if images.ndim < 2:
        raise ConfigError(
            f"images has shape {tuple(images.shape)}, must have one of its own for each image, (n, C, H, W)"
        )
    if images.device != labels.device:
        raise ConfigError(f"images is on {images.device}, labels on {labels.device}: move both to the same device")
    if not isinstance(task, Classification):
        return images, labels
    if labels.ndim != 1:
        raise ConfigError(f"labels has shape {tuple(labels.shape)}, must be (n,), the class index of each image")
    if labels.dtype not in _KINDS_OF_LABELS:
        raise ConfigError(f"labels has type {labels.dtype}, must be whole numbers, class indices such as labels.long()")
    if len(labels) and int(labels.min()) < 0:
        raise ConfigError(f"labels has {int(labels.min())}, must be class indices from 0 on")
    return images, labels.long()


def taken_by(model: nn.Module, calibration: AnyCalibration) -> tuple[nn.Module, AnyCalibration]:
    """Prepares `model` for `calibration`, in place.

    Raises ConfigError if the network does not accept the inputs, or if they do not give one finite loss for each
    example; for images by cross-entropy, if it does not return one number per class for each label.
    """
    try:
        model, calibration = ready_with(model, calibration)
    except Exception as error:  # the network's own code may raise any error
        if isinstance(error, LaaspError) or is_out_of_memory(error):
            raise
        raise ConfigError(_not_taken(calibration, error)) from error
    if isinstance(calibration, CalibrationSet) and isinstance(calibration.task, Classification):
        _check_classes(model, calibration)
    else:
        # The set may have a single example, and the trial takes two.
        check_losses(
            calibration.task,
            deep_copy(model),
            lambda places: calibration.at(np.array(places) % len(calibration)),
        )
    return model, calibration


def example_of(calibration: Calibration, input_shape: Sequence[int] | None) -> torch.Tensor:
    """An input (1, ...) that the network is analysed with: the first one, or noise of `input_shape` (C, H, W).

    Raises ConfigError without `input_shape` if inputs are no tensor.
    """
    if input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *input_shape, generator=generator).to(calibration.device)
    example = calibration.at(np.arange(1))[0]
    if not isinstance(example, torch.Tensor):
        raise ConfigError(
            f"the inputs of a batch are a {type(example).__name__}, and the network is analysed with one tensor: give "
            "its shape, input_shape=(C, H, W)"
        )
    return example


def _not_taken(calibration: Calibration, error: Exception) -> str:
    if not isinstance(calibration, CalibrationSet):
        return f"the network or its loss does not take these examples ({describe_error(error)})"
    shape, kind = tuple(calibration.images.shape[1:]), calibration.images.dtype
    return (
        f"the network does not take these images, {kind} of shape {shape} each ({describe_error(error)}): "
        "give what it takes, or `prepare` that makes it of them"
    )


@torch.inference_mode()
def _check_classes(model: nn.Module, calibration: CalibrationSet) -> None:
    output = model(calibration.at(np.arange(1))[0])
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = (
            f"a tensor of shape {tuple(output.shape)}"
            if isinstance(output, torch.Tensor)
            else f"a {type(output).__name__}"
        )
        raise ConfigError(
            f"the network gives {found}, must give one tensor of shape (images, classes): wrap it in a module that "
            "gives only the scores of the classes"
        )
    if int(calibration.labels.max()) >= output.shape[1]:
        raise ConfigError(
            f"labels has {int(calibration.labels.max())}, but the network has {output.shape[1]} outputs, for classes 0 "
            f"to {output.shape[1] - 1}"
        )
