"""What a network's filters tell of the classes: the VIP (criteria/pls.py) of their pooled outputs on the calibration
set.

Images are looked at in chunks that are always cut the same way, each giving its moments, which are added up in their
order: whoever measures the chunks, and however many they are, the sums are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional

from laasp_ray.config import POOLING, PruneConfig
from laasp_ray.criteria.pls import Moments, vip
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.models.untouched import in_eval_mode
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.memory import retried
from laasp_ray.search.precision import full_precision

CHUNKS = 32
"""At most so many chunks: each one's products travel to where they are added up."""
MEMORY_SHARE = 0.5
"""How much of the memory that is free two tables of products, a chunk's and the sum, may take."""


@dataclass(frozen=True)
class ImportanceRequest:
    """The importance of these layers' filters is wanted, all layers in one fit of `components`."""

    layers: tuple[str, ...]
    pooling: str
    components: int

    @staticmethod
    def of(layers: Iterable[str], config: PruneConfig) -> ImportanceRequest:
        return ImportanceRequest(tuple(layers), config.pooling, config.components)


@dataclass(frozen=True)
class FirstBatch:
    """What the first batch shows: `pilot` (D,) is its features' mean, `shapes` each layer's filters and windows."""

    pilot: torch.Tensor
    shapes: Mapping[str, tuple[int, int]]
    classes: int


def importance(model: nn.Module, calibration: CalibrationSet, wanted: ImportanceRequest) -> dict[str, torch.Tensor]:
    """VIP (N,) of the N filters of each wanted layer; `model` in eval mode on the calibration set's device, not
    changed.

    A filter's features are its raw outputs, pooled; with windows, its VIP is the mean over them. Raises SearchError
    where outputs are not finite or the classes cannot be told apart, ConfigError for more features than there is
    memory for.
    """
    look = measure_first_batch(model, calibration, wanted)
    chunks = chunks_of(len(calibration), calibration.batch_size)
    return scores_of((moments_of(model, calibration, wanted, look, chunk) for chunk in chunks), look, wanted.components)


def chunks_of(images: int, batch_size: int) -> list[np.ndarray]:
    """Positions of images, whole batches together, in at most CHUNKS chunks."""
    size = math.ceil(math.ceil(images / batch_size) / CHUNKS) * batch_size
    return [np.arange(start, min(start + size, images)) for start in range(0, images, size)]


@full_precision()
@torch.no_grad()
def measure_first_batch(model: nn.Module, calibration: CalibrationSet, wanted: ImportanceRequest) -> FirstBatch:
    images, labels = calibration.at(np.arange(min(calibration.batch_size, len(calibration))))
    shapes, features = _features_of_batch(model, images, wanted)
    check_columns(shapes, wanted.pooling, labels.device)
    return FirstBatch(features.double().mean(dim=0), shapes, int(calibration.labels.max()) + 1)


@full_precision()
@torch.no_grad()
def moments_of(
    model: nn.Module, calibration: CalibrationSet, wanted: ImportanceRequest, look: FirstBatch, chunk: np.ndarray
) -> Moments:
    """The moments of the images at `chunk` (n,), batch by batch, on the calibration set's device."""
    moments = Moments.empty(look.pilot.to(calibration.labels.device), look.classes)
    for start in range(0, len(chunk), calibration.batch_size):
        images, labels = calibration.at(chunk[start : start + calibration.batch_size])
        moments.add(_features_of_batch(model, images, wanted)[1], labels)
    return moments


def scores_of(parts: Iterable[Moments], look: FirstBatch, components: int) -> dict[str, torch.Tensor]:
    """VIP (N,) of every layer's filters, on the CPU, from the moments of all chunks, in the order of the chunks."""
    total = Moments.empty(look.pilot, look.classes)
    for part in parts:
        total.merge(part)
    columns = vip(total, components).cpu()
    parted = columns.split([filters * windows for filters, windows in look.shapes.values()])
    return {
        layer: values.unflatten(0, shape).mean(dim=1)
        for (layer, shape), values in zip(look.shapes.items(), parted, strict=True)
    }


@torch.no_grad()
def shapes_of(model: nn.Module, example_input: torch.Tensor, wanted: ImportanceRequest) -> dict[str, tuple[int, int]]:
    """Layer -> its filters and the windows that each has. Its modules' modes are put back."""
    with in_eval_mode(model):
        return _features(model, example_input, wanted)[0]


def check_columns(shapes: Mapping[str, tuple[int, int]], pooling: str, device: torch.device) -> None:
    """Raises ConfigError if the products of all features do not fit into memory."""
    columns = sum(filters * windows for filters, windows in shapes.values())
    wanted = 2 * 8 * columns**2
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if wanted > MEMORY_SHARE * free:
        raise ConfigError(
            f"prune.pooling {pooling!r} gives {columns} features, whose products take {wanted / 1e9:.1f} GB of the "
            f"{free / 1e9:.1f} GB that are free: pool in larger windows (such as max8x8) or whole (max, avg), or name "
            "layers in prune.ignored"
        )


def pooled(output: torch.Tensor, pooling: str) -> torch.Tensor:
    """A filter's outputs in one number for each window: (B, N, ...) -> (B, N, windows).

    Windows lie side by side from the corner on; those at the far edges may be smaller. Raises ConfigError for windows
    in outputs that are not pictures.
    """
    match = POOLING.fullmatch(pooling)
    assert match is not None  # checked by the config
    kind, *window = match.groups()
    if output.ndim == 2:
        return output.unsqueeze(2)
    if window[0] is None:
        flat = output.flatten(2)
        return flat.amax(dim=2, keepdim=True) if kind == "max" else flat.mean(dim=2, keepdim=True)
    if output.ndim != 4:
        raise ConfigError(
            f"prune.pooling {pooling!r} has windows of a picture, but a layer's output has shape "
            f"{tuple(output.shape)}: use 'max' or 'avg'"
        )
    size = [min(int(wanted), have) for wanted, have in zip(window, output.shape[2:], strict=True)]
    pool = functional.max_pool2d if kind == "max" else functional.avg_pool2d
    return pool(output, size, stride=size, ceil_mode=True).flatten(2)


def _features_of_batch(
    model: nn.Module, images: torch.Tensor, wanted: ImportanceRequest
) -> tuple[dict[str, tuple[int, int]], torch.Tensor]:
    what = f"a batch of {len(images)} images, whose outputs filters are scored by,"
    return retried(lambda: _features(model, images, wanted), what, "lower search.batch_size")


def _features(
    model: nn.Module, images: torch.Tensor, wanted: ImportanceRequest
) -> tuple[dict[str, tuple[int, int]], torch.Tensor]:
    """Layer -> its filters and windows, and their features (B, D) in this order."""
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in wanted.layers}

    def hook_of(layer: str) -> object:
        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            by_filter = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output
            found[layer].append(pooled(by_filter, wanted.pooling))

        return keep

    hooks = [model.get_submodule(layer).register_forward_hook(hook_of(layer)) for layer in wanted.layers]  # type: ignore[arg-type]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # A layer that is run several times gives windows each time.
    features = {layer: torch.cat(parts, dim=2) for layer, parts in found.items()}
    _check_finite(features)
    shapes = {layer: (part.shape[1], part.shape[2]) for layer, part in features.items()}
    return shapes, torch.cat([part.flatten(1) for part in features.values()], dim=1)


def _check_finite(features: Mapping[str, torch.Tensor]) -> None:
    wrong: Sequence[str] = [layer for layer, part in features.items() if not bool(part.isfinite().all())]
    if wrong:
        raise SearchError(
            f"the outputs of {wrong[0]} are not finite: the network's weights have probably diverged; lower "
            "train.learning_rate or start from an earlier checkpoint"
        )
