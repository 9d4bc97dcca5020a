"""Criteria for the least important filters of a layer, by name or import path. There are two kinds, and obs.

A criterion of weights is a pure function: weights of shape (N, K), one row for each filter, to scores of shape (N,) on
the same device. A criterion of data (DataCriterion) scores the outputs of filters on images, for all layers at once.
search/activations.py runs the network and passes the outputs to it. The filters with the lowest scores are pruned
first. The criterion obs (obs.py) takes filters one by one, by what the layers that read them cannot make up for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from laasp_ray.config.names import did_you_mean, imported, is_import_path
from laasp_ray.criteria import magnitude as _magnitude
from laasp_ray.criteria import obs as _obs
from laasp_ray.criteria import of_data as _of_data
from laasp_ray.criteria import pls as _pls
from laasp_ray.criteria import similarity as _similarity
from laasp_ray.criteria.of_data import DataCriterion, FirstBatch, Shapes
from laasp_ray.criteria.pooling import pooled
from laasp_ray.criteria.registry import CRITERIA, AnyCriterion, Criterion, register
from laasp_ray.errors import ConfigError, LaaspError, SearchError

__all__ = [
    "Criterion",
    "DataCriterion",
    "FirstBatch",
    "Shapes",
    "data_criterion",
    "filters_of",
    "get",
    "known",
    "looks_at_data",
    "lowest",
    "pooled",
    "register",
    "scores",
]
_BUILT_IN = (_magnitude, _similarity, _pls, _obs)
"""Modules that register criteria when they are imported."""


def known() -> tuple[str, ...]:
    """The registered names; criteria of weights come first, then obs."""
    return tuple(sorted(CRITERIA, key=lambda name: (_of_data.is_data_criterion(CRITERIA[name]), name == _obs.NAME)))


def get(name: str) -> AnyCriterion:
    """A criterion by its name, or by its import path `package.module:name`. Raises ConfigError if there is none."""
    if name in CRITERIA:
        return CRITERIA[name]
    if not is_import_path(name):
        hint = f"{did_you_mean(name, known())} known: {', '.join(known())}".lstrip()
        raise ConfigError(f"unknown criterion {name!r}; {hint}, or an import path package.module:name")
    return _of_data.checked(name, imported(name, "criterion", of_any_kind=True))


def looks_at_data(name: str) -> bool:
    """Whether `name` is a criterion of data, not of weights. Raises ConfigError for an unknown one."""
    return _of_data.is_data_criterion(get(name))


def data_criterion(name: str, **options: Any) -> DataCriterion[Any]:
    """Makes the criterion of data `name`, with those of the `options` that its constructor takes.

    Raises ConfigError for an unknown criterion, for one of weights, and for one that cannot be made.
    """
    if not looks_at_data(name):
        raise ConfigError(f"criterion {name!r} scores weights, not activations: it looks at no images")
    return _of_data.made(name, get(name), options)


def scores(name: str, weight: torch.Tensor | nn.Module) -> torch.Tensor:
    """Scores (N,) by the criterion `name` of a layer's N filters, or of a weight whose first axis counts filters.

    Pass the layer itself if it may be a transposed convolution. Raises ConfigError for an unknown criterion and for one
    that fails or does not return one score per filter. Raises SearchError, naming the criterion, if a score is NaN.
    """
    rows = filters_of(weight) if isinstance(weight, nn.Module) else weight.detach().flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # in half precision most scores would be equal
    criterion = get(name)
    if _of_data.is_data_criterion(criterion):
        raise ConfigError(f"criterion {name!r} scores activations, not weights: it needs the network and images")
    try:
        result = cast(Criterion, criterion)(rows)
    except LaaspError:  # it says itself what is wrong
        raise
    except Exception as error:  # a user's function can raise any error
        raise ConfigError(
            f"criterion {name!r} failed on weights of shape {tuple(rows.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != (rows.shape[0],):
        given = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ConfigError(
            f"criterion {name!r} must give a tensor of shape ({rows.shape[0]},) for weights of shape "
            f"{tuple(rows.shape)}, gave {given}"
        )
    if bool(torch.isnan(result).any()):
        raise SearchError(
            f"criterion {name!r} gives NaN for filters {torch.isnan(result).nonzero().flatten().tolist()}"
            f" of weights of shape {tuple(rows.shape)}: are the weights finite?"
        )
    return result


def filters_of(layer: nn.Module) -> torch.Tensor:
    """A layer's weight as (N, K), one row for each filter. The layer is a convolution, transposed or not, or a linear
    layer.
    """
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # The shape is (inputs, filters of a group, ...); each group has an equal block of the inputs.
        blocks = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return blocks.flatten(0, 1).flatten(1)
    return weight.flatten(1)


def lowest(scores: torch.Tensor, count: int, blocks: int = 1) -> tuple[int, ...]:
    """The rising indices of the `count` lowest of scores (N,), with the same number from each of `blocks` equal
    contiguous blocks.

    The lower of two indices with equal scores goes first. Raises SearchError for NaN, ValueError for counts that do not
    divide.
    """
    if scores.dim() != 1 or scores.shape[0] % blocks or count % blocks or not 0 <= count <= scores.shape[0]:
        raise ValueError(f"{count} lowest of scores of shape {tuple(scores.shape)} in {blocks} equal blocks")
    if bool(torch.isnan(scores).any()):
        raise SearchError(f"scores of filters {torch.isnan(scores).nonzero().flatten().tolist()} are NaN")
    width = scores.shape[0] // blocks
    order = scores.reshape(blocks, width).argsort(dim=1, stable=True)[:, : count // blocks]
    offsets = torch.arange(blocks, device=scores.device).unsqueeze(1) * width
    return tuple((order + offsets).flatten().sort().values.tolist())
