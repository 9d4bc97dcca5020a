"""The effect of group sparsity: density by layer, and the utilisation of an accelerator's multipliers.

The simulated accelerator fetches the activations of a group of g inputs at a time and shares them among lanes. Each
lane computes one output channel with g - p multipliers, and each multiplier processes one non-zero weight a cycle. All
lanes continue to the next group when the slowest lane is done, and a fetch takes at least one cycle. Utilisation is the
share of multipliers x cycles that did work. A layer with fewer channels than lanes uses fewer lanes. Unstructured
pruning is simulated on the same machine: each weight is kept independently with the layer's own density.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from laasp_ray.data.ordering import derive_seed
from laasp_ray.errors import StoreError
from laasp_ray.pruning.sparsity.groups import GroupRule, group_counts, unpack_mask
from laasp_ray.records import to_json

LANES = 16
"""Output channels that share a fetched group (our choice). With more lanes, each waits longer for the slowest."""


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """The sparsity of a convolution or linear layer. `macs` are those of its dense form at one input.

    For a dense layer `group`, `prune` and both utilisations are None, and `reason` says why it is dense.
    """

    layer: str
    weights: int
    kept: int
    macs: int
    group: int | None = None
    prune: int | None = None
    utilisation: float | None = None
    utilisation_unstructured: float | None = None
    reason: str = ""

    @property
    def density(self) -> float:
        return self.kept / self.weights


def measure_sparsity(
    model: nn.Module,
    rules: Mapping[str, GroupRule],
    dense: Mapping[str, str],
    masks: Mapping[str, bytes],
    macs: Mapping[str, int],
    *,
    seed: int,
) -> list[LayerSparsity]:
    """One row for each layer of `rules` and `dense`, in network order. `masks`: parameter -> packed mask. `macs`: by
    layer.
    """
    rows = []
    for name, module in model.named_modules():
        if name in dense:
            weights = sum(p.numel() for key, p in module.named_parameters() if "weight" in key)
            rows.append(
                LayerSparsity(layer=name, weights=weights, kept=weights, macs=macs.get(name, 0), reason=dense[name])
            )
        elif name in rules:
            weight, rule = module.get_parameter("weight"), rules[name]
            mask = unpack_mask(masks[f"{name}.weight"], weight.shape)
            counts, groups = group_counts(mask, rule.group), int(getattr(module, "groups", 1))
            drawn = _unstructured(mask, rule.group, derive_seed(seed, f"unstructured, {name}"))
            multipliers = rule.kept_of(rule.group)
            rows.append(
                LayerSparsity(
                    layer=name,
                    weights=weight.numel(),
                    kept=int(mask.sum()),
                    macs=macs.get(name, 0),
                    group=rule.group,
                    prune=rule.pruned_per_group,
                    utilisation=utilisation(counts, multipliers, groups),
                    utilisation_unstructured=utilisation(drawn, multipliers, groups),
                )
            )
    return rows


def utilisation(counts: np.ndarray, multipliers: int, groups: int = 1, lanes: int = LANES) -> float:
    """The share of multipliers x cycles that is used (see the module's docstring).

    `counts`: non-zero weights of each output channel in each fetched group, (N, steps). The channels of one of the
    `groups` of a grouped convolution read the same inputs, so only they share lanes.
    """
    slots = 0
    for channels in np.split(counts, groups):
        for first in range(0, len(channels), lanes):
            block = channels[first : first + lanes]
            cycles = np.maximum(1, -(-block // multipliers)).max(axis=0).sum()
            slots += int(cycles) * len(block) * multipliers
    return int(counts.sum()) / slots


def _unstructured(mask: torch.Tensor, group: int, seed: int) -> np.ndarray:
    """Counts in the form of `group_counts`, for weights that are kept independently with the mask's density."""
    sizes = group_counts(torch.ones_like(mask[:1]), group)
    density = float(mask.double().mean())
    return np.random.default_rng(seed).binomial(np.broadcast_to(sizes, (len(mask), sizes.shape[1])), density)


def sparsity_to_json(rows: Sequence[LayerSparsity]) -> dict[str, Any]:
    """The content of a run's `sparsity.json`."""
    return {"lanes": LANES, "layers": [to_json(row) | {"density": row.density} for row in rows]}


def sparsity_from_json(data: Mapping[str, Any]) -> list[LayerSparsity]:
    """The inverse of `sparsity_to_json`. Raises StoreError for other data."""
    try:
        return [
            LayerSparsity(**{key: value for key, value in row.items() if key != "density"}) for row in data["layers"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"not a report of sparsity that this version can read ({error!r})") from error
