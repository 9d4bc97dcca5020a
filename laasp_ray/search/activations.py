"""Scores of a network's filters by a criterion of data.

The filters' outputs on the calibration set are passed to the criterion (see criteria/of_data.py). Images are processed
in chunks that are always the same. Each chunk gives a state, and the states are merged in the same order. So the scores
are equal to the last bit for any number of processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config.pls import FitConfig
from laasp_ray.criteria import DataCriterion, FirstBatch, Shapes
from laasp_ray.errors import ConfigError, LaaspError, SearchError, is_out_of_memory
from laasp_ray.models.untouched import in_eval_mode
from laasp_ray.search.evaluate import Calibration, CalibrationSet
from laasp_ray.search.memory import retried
from laasp_ray.search.precision import full_precision

CHUNKS = 32
"""The largest number of chunks. Each chunk's state is sent to the process that merges them."""
TRIAL_IMAGES = 8

logger = logging.getLogger(__name__)


class NanScoresError(SearchError):
    """A criterion gives NaN although the filters' outputs are finite."""


@dataclass(frozen=True)
class ImportanceRequest:
    """A request for the scores of these layers' filters by `criterion`. Errors call the criterion `name`."""

    layers: tuple[str, ...]
    name: str
    criterion: DataCriterion[Any]

    @staticmethod
    def of(layers: Iterable[str], name: str, config: FitConfig) -> ImportanceRequest:
        """The request for criterion `name`. Raises ConfigError if there is no such criterion of data."""
        criterion = criteria.data_criterion(name, components=config.components, pooling=config.pooling)
        return ImportanceRequest(tuple(layers), name, criterion)


def importance(model: nn.Module, calibration: Calibration, wanted: ImportanceRequest) -> dict[str, torch.Tensor]:
    """Scores (N,), on the CPU, of the N filters of each wanted layer.

    `model` is in eval mode on the calibration set's device and is not changed. Raises SearchError if outputs are not
    finite or scores are NaN. Raises ConfigError for a criterion that fails or returns another shape. A LaaspError of
    the criterion itself is raised unchanged.
    """
    first = measure_first_batch(model, calibration, wanted)
    chunks = chunks_of(len(calibration), calibration.batch_size)
    return scores_of((state_of(model, calibration, wanted, first, chunk) for chunk in chunks), first, wanted)


def chunks_of(images: int, batch_size: int, most: int = CHUNKS) -> list[np.ndarray]:
    """Positions of images in at most `most` chunks of whole batches."""
    size = math.ceil(math.ceil(images / batch_size) / most) * batch_size
    return [np.arange(start, min(start + size, images)) for start in range(0, images, size)]


@full_precision()
@torch.no_grad()
def measure_first_batch(model: nn.Module, calibration: Calibration, wanted: ImportanceRequest) -> FirstBatch:
    images, targets = calibration.at(np.arange(min(calibration.batch_size, len(calibration))))
    has_responses = calibration.task.responses is not None
    classes = calibration.labels_of(targets).shape[1] if has_responses else int(calibration.class_labels().max()) + 1
    features = _features_of_batch(model, images, wanted)
    shapes = _shapes(features)
    _check(wanted, shapes, calibration.device)
    # The means are taken over one table, because rounding may depend on the number of columns.
    means = torch.cat([part.flatten(1) for part in features.values()], dim=1).double().mean(dim=0)
    parted = means.split([filters * width for filters, width in shapes.values()])
    pairs = zip(shapes.items(), parted, strict=True)
    by_layer = {layer: part.unflatten(0, shape).clone() for (layer, shape), part in pairs}
    return FirstBatch(by_layer, classes, has_responses)


@full_precision()
@torch.no_grad()
def state_of(
    model: nn.Module, calibration: Calibration, wanted: ImportanceRequest, first: FirstBatch, chunk: np.ndarray
) -> Any:
    """The criterion's state after the images at `chunk` (n,), batch by batch, on the calibration set's device."""
    state = _start(wanted, first.to(calibration.device))
    for start in range(0, len(chunk), calibration.batch_size):
        images, targets = calibration.at(chunk[start : start + calibration.batch_size])
        features = _features_of_batch(model, images, wanted)
        labels = calibration.labels_of(targets)
        with _called(wanted, "accumulate"):
            state = _given(wanted, "accumulate", wanted.criterion.accumulate(state, features, labels))
    return state


@torch.no_grad()
def scores_of(states: Iterable[Any], first: FirstBatch, wanted: ImportanceRequest) -> dict[str, torch.Tensor]:
    """Scores (N,) of every layer's filters, on the CPU, from the states of all chunks in the order of the chunks."""
    total = _start(wanted, first)
    for state in states:
        with _called(wanted, "merge"):
            total = _given(wanted, "merge", wanted.criterion.merge(total, state))
    shapes = first.shapes
    with _called(wanted, "scores"):
        found = wanted.criterion.scores(total, shapes)
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"criterion {wanted.name!r} must give scores by layer, a mapping, gave a {type(found).__name__}"
        )
    return {layer: _checked_scores(wanted.name, layer, found.get(layer), shapes[layer][0]) for layer in wanted.layers}


@torch.no_grad()
def shapes_of(model: nn.Module, example_input: torch.Tensor, wanted: ImportanceRequest) -> Shapes:
    """Layer -> (number of filters, number of features of each filter). Modules keep their modes."""
    with in_eval_mode(model):
        return _shapes(_features(model, example_input, wanted))


def check_request(model: nn.Module, example_input: torch.Tensor, wanted: ImportanceRequest) -> None:
    """Raises ConfigError if the criterion does not work on this network.

    The criterion's own `check` gets all layers, and the first layer is tried. Modules keep their modes. The trial uses
    noise, so a SearchError that no score can be computed from it is accepted.
    """
    _check(wanted, shapes_of(model, example_input, wanted), example_input.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(TRIAL_IMAGES, *example_input.shape[1:], generator=generator).to(example_input)
    labels = torch.arange(TRIAL_IMAGES, device=example_input.device) % 2
    calibration = CalibrationSet(noise, labels, TRIAL_IMAGES // 2, memory_format=torch.contiguous_format)
    tried = ImportanceRequest(wanted.layers[:1], wanted.name, wanted.criterion)
    try:
        with in_eval_mode(model):
            importance(model, calibration, tried)
    except (ConfigError, NanScoresError) as error:
        raise ConfigError(f"prune.criteria, tried on layer {wanted.layers[0]}: {error}") from error
    except SearchError as error:
        logger.debug("criterion %s, tried on noise: %s", wanted.name, error)


def _features_of_batch(model: nn.Module, images: torch.Tensor, wanted: ImportanceRequest) -> dict[str, torch.Tensor]:
    what = f"a batch of {len(images)} images, whose outputs filters are scored by,"
    return retried(lambda: _features(model, images, wanted), what, "lower search.batch_size")


def _features(model: nn.Module, images: torch.Tensor, wanted: ImportanceRequest) -> dict[str, torch.Tensor]:
    """Layer -> features (B, N, W)."""
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in wanted.layers}

    def hook_of(layer: str) -> object:
        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            by_filter = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output
            found[layer].append(_features_of_layer(wanted, layer, by_filter))

        return keep

    hooks = [model.get_submodule(layer).register_forward_hook(hook_of(layer)) for layer in wanted.layers]  # type: ignore[arg-type]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # A layer that runs several times has features for each call.
    return {layer: torch.cat(parts, dim=2) for layer, parts in found.items()}


def _features_of_layer(wanted: ImportanceRequest, layer: str, output: torch.Tensor) -> torch.Tensor:
    """Features (B, N, W) of a layer's output (B, N, ...)."""
    with _called(wanted, "features"):
        features = wanted.criterion.features(output)
    if not isinstance(features, torch.Tensor) or features.ndim != 3 or features.shape[:2] != output.shape[:2]:
        raise ConfigError(
            f"criterion {wanted.name!r} must give features of shape ({output.shape[0]}, {output.shape[1]}, any) for "
            f"outputs of shape {tuple(output.shape)} of layer {layer}, gave {_kind(features)}"
        )
    if not bool(features.isfinite().all()):
        if bool(output.isfinite().all()):
            raise NanScoresError(
                f"criterion {wanted.name!r} gives features that are not finite for finite outputs of layer {layer}"
            )
        raise SearchError(
            f"the outputs of {layer} are not finite: the network's weights have probably diverged; lower "
            "train.learning_rate or start from an earlier checkpoint"
        )
    # The network may change its output in place, which must not change the stored features.
    shared = features.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return features.clone() if shared else features


def _shapes(features: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {layer: (part.shape[1], part.shape[2]) for layer, part in features.items()}


def _checked_scores(name: str, layer: str, scores: Any, filters: int) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (filters,):
        raise ConfigError(
            f"criterion {name!r} must give a tensor of shape ({filters},) for layer {layer}, gave {_kind(scores)}"
        )
    wrong = torch.isnan(scores).nonzero().flatten().tolist()
    if wrong:
        raise NanScoresError(f"criterion {name!r} gives NaN for filters {wrong} of layer {layer}")
    return scores.cpu()


def _check(wanted: ImportanceRequest, shapes: Shapes, device: torch.device) -> None:
    with _called(wanted, "check"):
        wanted.criterion.check(shapes, device)


def _start(wanted: ImportanceRequest, first: FirstBatch) -> Any:
    with _called(wanted, "start"):
        return _given(wanted, "start", wanted.criterion.start(first))


def _given(wanted: ImportanceRequest, method: str, state: Any) -> Any:
    if state is None:
        raise ConfigError(f"criterion {wanted.name!r} gives None in {method}, must give its state")
    return state


@contextmanager
def _called(wanted: ImportanceRequest, method: str) -> Iterator[None]:
    """Converts an error of a criterion's method to ConfigError, except for a LaaspError and when memory runs out."""
    try:
        yield
    except Exception as error:  # a user's method can raise any error
        if isinstance(error, LaaspError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"criterion {wanted.name!r} failed in {method}: {type(error).__name__}: {error}") from error


def _kind(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
