"""What `rank` is given, checked before anything expensive."""

from __future__ import annotations

import torch
from torch import nn

from laasp_ray.config import SearchConfig
from laasp_ray.errors import ConfigError, LaaspError, describe_error, is_out_of_memory
from laasp_ray.search.evaluate import CalibrationSet, ready_with

_KINDS_OF_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_search(batch_size: int, memory_mb: int, *, racing: bool, racing_error: float) -> SearchConfig:
    """The settings of the search. Raises ConfigError for values out of range, and for what is no whole number."""
    for name, value in (("batch_size", batch_size), ("memory_mb", memory_mb)):
        if type(value) is not int:
            raise ConfigError(f"{name} is {value!r}, must be a whole number")
    return SearchConfig(
        batch_size=batch_size, memory_mb=memory_mb, racing="on" if racing else "off", racing_error=racing_error
    )


def checked_data(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and labels as int64. Raises ConfigError for what is no tensor, or of another shape, type or device."""
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{name} is a {type(value).__name__}, must be a tensor: collect what a loader gives, with torch.cat"
            )
    if images.ndim < 2:
        raise ConfigError(
            f"images has shape {tuple(images.shape)}, must have one of its own for each image, (n, C, H, W)"
        )
    if labels.ndim != 1:
        raise ConfigError(f"labels has shape {tuple(labels.shape)}, must be (n,), the class index of each image")
    if labels.dtype not in _KINDS_OF_LABELS:
        raise ConfigError(f"labels has type {labels.dtype}, must be whole numbers, class indices such as labels.long()")
    if images.device != labels.device:
        raise ConfigError(f"images is on {images.device}, labels on {labels.device}: move both to the same device")
    if len(labels) and int(labels.min()) < 0:
        raise ConfigError(f"labels has {int(labels.min())}, must be class indices from 0 on")
    return images, labels.long()


def taken_by(model: nn.Module, calibration: CalibrationSet) -> tuple[nn.Module, CalibrationSet]:
    """`model` made ready for `calibration`, in place. Raises ConfigError where it does not take its images, or does not
    give one finite number for each class and label."""
    try:
        model, calibration = ready_with(model, calibration)
        with torch.inference_mode():
            output = model(next(calibration.batches())[0][:1])
    except Exception as error:  # the network's own code may raise anything
        if isinstance(error, LaaspError) or is_out_of_memory(error):
            raise
        shape, kind = tuple(calibration.images.shape[1:]), calibration.images.dtype
        raise ConfigError(
            f"the network does not take these images, {kind} of shape {shape} each ({describe_error(error)}): "
            "give what it takes, or `prepare` that makes it of them"
        ) from error
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
    return model, calibration
