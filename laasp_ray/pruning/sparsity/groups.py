"""Group sparsity: `prune` weights are zero in every `group` consecutive inputs of a layer.

Source: Kang, IEEE TCSVT 30(7) 2020. Its procedure is not fully public, and this is our interpretation: groups lie along
the input channels, for each output channel and kernel position, and the smallest magnitudes of a group are pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from laasp_ray.errors import PruningError
from laasp_ray.pruning.names import ignored_modules

_CHUNK = 1 << 23
"""The number of weights that are sorted at a time. The sort indices of a large linear layer would need gigabytes."""


@dataclass(frozen=True)
class GroupRule:
    """In every group of `group` consecutive inputs `pruned_per_group` weights are zero."""

    group: int
    pruned_per_group: int

    def __post_init__(self) -> None:
        if not 0 <= self.pruned_per_group < self.group:
            raise PruningError(
                f"{self.pruned_per_group} of every {self.group} cannot be pruned: at least one weight must stay"
            )

    def kept_of(self, size: int) -> int:
        """The number of weights kept in a group of `size` (the last may be short): the same share, rounded up."""
        return -(-size * (self.group - self.pruned_per_group) // self.group)

    def kept_in(self, shape: Sequence[int]) -> int:
        """The number of weights kept in a weight of this shape, (N, C, *kernel) or (N, C)."""
        whole, rest = divmod(shape[1], self.group)
        return math.prod(shape) // shape[1] * (whole * self.kept_of(self.group) + self.kept_of(rest))


@dataclass(frozen=True)
class Layers:
    """The layers that can have groups, each kind in network order. `dense`: the other layers, with the reason."""

    convolutions: tuple[str, ...]
    linear: tuple[str, ...]
    dense: Mapping[str, str]


def sort_layers(model: nn.Module, group: int, ignored: Sequence[str] = ()) -> Layers:
    """Finds the convolutions and linear layers of `model` that can have groups of `group` inputs.

    `ignored` names modules, which stay dense with all their submodules, or prefixes that end in a dot. Raises
    ConfigError for an entry that names nothing.
    """
    convolutions: list[str] = []
    linear: list[str] = []
    dense: dict[str, str] = {}
    frozen = ignored_modules([name for name, _ in model.named_modules()], ignored)
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        reason = "named in prune.ignored" if name in frozen else _why_dense(module, group)
        if reason:
            dense[name] = reason
        else:
            (linear if isinstance(module, nn.Linear) else convolutions).append(name)
    return Layers(tuple(convolutions), tuple(linear), dense)


def _why_dense(module: nn.Module, group: int) -> str:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its weight is no plain parameter"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if isinstance(module, nn.modules.conv._ConvNd) and weight.shape[1] == 1 and module.groups > 1:
        return "depthwise"
    inputs = weight.shape[1]
    return f"{inputs} inputs a filter, fewer than the group of {group}" if inputs < group else ""


def group_mask(weight: torch.Tensor, rule: GroupRule, earlier: torch.Tensor | None = None) -> torch.Tensor:
    """True where a weight is kept; of the shape of `weight`, (N, C, *kernel) or (N, C).

    C is the number of inputs of one filter: in a grouped convolution those of its own group. For each filter and kernel
    position the smallest magnitudes of each group are pruned; of equal ones the higher index is kept. Weights that
    the mask `earlier` has pruned are pruned first.
    """
    magnitudes = weight.detach().abs()
    if earlier is not None:
        magnitudes = magnitudes.masked_fill(~earlier, -1)
    rows = magnitudes.movedim(1, -1)
    shape, inputs = rows.shape, rows.shape[-1]
    parts = [_row_mask(part, rule) for part in rows.reshape(-1, inputs).split(max(1, _CHUNK // inputs))]
    return torch.cat(parts).reshape(shape).movedim(-1, 1).contiguous()


def _row_mask(rows: torch.Tensor, rule: GroupRule) -> torch.Tensor:
    whole = rows.shape[1] // rule.group * rule.group
    mask = torch.ones_like(rows, dtype=torch.bool)
    if whole:
        groups = rows[:, :whole].unflatten(1, (-1, rule.group))
        mask[:, :whole] = _largest(groups, rule.kept_of(rule.group)).flatten(1)
    if whole < rows.shape[1]:
        mask[:, whole:] = _largest(rows[:, whole:], rule.kept_of(rows.shape[1] - whole))
    return mask


def _largest(values: torch.Tensor, kept: int) -> torch.Tensor:
    """True at the `kept` largest values along the last axis. Of equal values the later ones are taken."""
    lowest = values.argsort(dim=-1, stable=True)[..., : values.shape[-1] - kept]
    return torch.ones_like(values, dtype=torch.bool).scatter_(-1, lowest, False)


def group_counts(mask: torch.Tensor, group: int) -> np.ndarray:
    """The number of kept weights in each group: (N, kernel positions x groups). The last group of a row may be
    short.
    """
    rows = mask.movedim(1, -1).flatten(1, -2) if mask.ndim > 2 else mask[:, None, :]
    missing = -rows.shape[-1] % group
    padded = nn.functional.pad(rows.to(torch.uint8), (0, missing))
    return padded.unflatten(-1, (-1, group)).sum(-1, dtype=torch.int32).flatten(1).cpu().numpy()


def satisfies(weight: torch.Tensor, rule: GroupRule) -> bool:
    """Whether no group of `weight` has more non-zero weights than `rule` allows."""
    groups = -(-weight.shape[1] // rule.group)
    allowed = np.full(groups, rule.kept_of(rule.group))
    if weight.shape[1] % rule.group:
        allowed[-1] = rule.kept_of(weight.shape[1] % rule.group)
    counts = group_counts(weight != 0, rule.group)
    return bool((counts.reshape(-1, groups) <= allowed).all())


def pack_mask(mask: torch.Tensor) -> bytes:
    """Packs a mask: one bit per weight, in the order of the tensor's elements."""
    return np.packbits(mask.cpu().numpy().reshape(-1)).tobytes()


def unpack_mask(packed: bytes, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `pack_mask`. Raises PruningError if the number of elements differs."""
    elements = math.prod(shape)
    if len(packed) != -(-elements // 8):
        raise PruningError(
            f"a mask of {len(packed)} bytes does not belong to a weight of shape {tuple(shape)}; "
            f"it would have {-(-elements // 8)}"
        )
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=elements)
    return torch.from_numpy(bits.astype(bool)).reshape(tuple(shape))


def masked(tensors: Mapping[str, torch.Tensor], masks: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Sets the weights that the masks (tensor name -> packed mask) prune to zero. Raises PruningError if a mask does
    not fit.
    """
    for name in masks:
        if name not in tensors:
            raise PruningError(f"there is a mask for {name}, but the network has no such weight")
    return {
        name: tensor.masked_fill(~unpack_mask(masks[name], tensor.shape).to(tensor.device), 0)
        if name in masks
        else tensor
        for name, tensor in tensors.items()
    }
