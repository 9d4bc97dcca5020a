"""The layers that read prunable channels, and how their inputs are counted for compensation (compensation.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from laasp_ray.config import Compensate
from laasp_ray.pruning.channels import ChannelAxis, Removal
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.masking import is_plain
from laasp_ray.pruning.plan import Plan

MOST_INPUTS = 5000
"""The most inputs that a group of a layer has moments of. Beyond that one mix of channels serves all taps of a kernel.
5000 inputs are 200 MB in float64, and a kernel of 3 x 3 has 4,608 of 512 channels.
"""

MOST_BYTES = 4_000_000_000
"""The most memory of all layers' moments together. Beyond that the layers with the most inputs get one mix of channels.
The moments of ResNet-50 are 1.0 GB. The bound is the same on every machine, so that decisions are.
"""


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer that reads prunable channels.

    Its weight has `columns` input channels (or features) for each of its `groups`, each at `taps` places of the kernel.
    `mixed`: one mix of channels serves all taps of the kernel, or all `block` features of a flattened channel. Then an
    input is a channel; else it is a column at a tap.
    """

    layer: str
    groups: int
    columns: int
    taps: int = 1
    block: int = 1
    mixed: bool = False

    @property
    def inputs(self) -> int:
        """The inputs of a group that moments are measured of."""
        return self.columns // self.block if self.mixed else self.columns * self.taps

    @property
    def sharing(self) -> int:
        """The number of weights of a filter that one input has."""
        return self.taps * self.block if self.mixed else 1

    @property
    def gram_bytes(self) -> int:
        return self.groups * (self.inputs + 1) ** 2 * 8

    def of_columns(self, columns: Collection[int]) -> list[int]:
        """The inputs (rising) that belong to these columns of a group."""
        if self.mixed:
            return sorted({column // self.block for column in columns})
        return [column * self.taps + tap for column in sorted(columns) for tap in range(self.taps)]

    def of_channels(self, channels: Collection[int]) -> list[list[int]]:
        """The inputs of each group that belong to these channels of the layer's input."""
        columns: list[list[int]] = [[] for _ in range(self.groups)]
        for channel in channels:
            columns[channel // self.columns].append(channel % self.columns)
        return [self.of_columns(some) for some in columns]

    def taken_by(self, step: Plan) -> list[list[int]]:
        """The inputs of each group that a prune takes. This is the reader before it."""
        kept = step.tensors.get(f"{self.layer}.weight", {}).get(1)
        if kept is None:
            return [[] for _ in range(self.groups)]
        parts = kept if len(kept) == self.groups else kept * self.groups
        return [self.of_columns(set(range(self.columns)) - set(part)) for part in parts]

    def with_columns(self, columns: int) -> Reader:
        return replace(self, columns=columns)

    def after(self, step: Plan) -> Reader:
        kept = step.tensors.get(f"{self.layer}.weight", {}).get(1)
        return self if kept is None else replace(self, columns=len(kept[0]))


def readers_of(
    graph: PruningGraph, model: nn.Module, mode: Compensate, widths: Mapping[str, int]
) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers of all prunable channels of `model`, and the reasons why others cannot be compensated, by layer.

    `widths` (layer -> columns) are those of the network that the moments are measured on. They decide what is mixed.
    """
    blocks: dict[ChannelAxis, set[int]] = {}
    reasons: dict[str, str] = {}
    for coupling in graph.couplings.values():
        for side, channels in coupling.sides.items():
            if side.role == "inputs":
                blocks.setdefault(side, set()).add(_block(channels.values()))
            elif side.role == "filters" and "groups" in side.attributes:
                reasons[side.module] = "it is depthwise: it has no other channel to make up from"
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    whole: dict[str, Reader] = {}
    for side, sizes in blocks.items():
        module = model.get_submodule(side.module)
        if not is_plain(module):
            reasons[side.module] = f"it is a {type(module).__name__}: not one of torch's plain layers, or with hooks"
        elif names[id(module.get_parameter("weight"))] > 1:
            reasons[side.module] = "its weight is shared with another layer"
        elif module.bias is not None and names[id(module.bias)] > 1:
            reasons[side.module] = "its bias is shared with another layer"
        else:
            block = min(sizes) if len(sizes) == 1 else 1  # maps of several sizes may be concatenated
            reader = _reader(side.module, module, block, mode, widths[side.module])
            if reader.inputs > MOST_INPUTS:
                reasons[side.module] = f"it has {reader.inputs:,} inputs, more than {MOST_INPUTS:,}"
            else:
                whole[side.module] = reader
    return {
        layer: reader.with_columns(model.get_submodule(layer).get_parameter("weight").shape[1])
        for layer, reader in _that_fit(whole, MOST_BYTES).items()
    }, reasons


def _that_fit(readers: Mapping[str, Reader], most_bytes: int) -> dict[str, Reader]:
    """The readers, with one mix of channels for those with the most inputs if all moments need more than this."""
    fitting = dict(readers)
    total = sum(reader.gram_bytes for reader in fitting.values())
    for reader in sorted(readers.values(), key=lambda reader: reader.inputs, reverse=True):
        if total <= most_bytes:
            break
        if not reader.mixed and reader.taps > 1:
            fitting[reader.layer] = replace(reader, mixed=True)
            total += fitting[reader.layer].gram_bytes - reader.gram_bytes
    return fitting


def losses_of(readers: Mapping[str, Reader], removal: Removal) -> dict[str, list[list[int]]]:
    """Reader -> the inputs of each of its groups that a prune takes."""
    return {
        side.module: readers[side.module].of_channels(channels)
        for side, channels in removal.items()
        if channels and side.role == "inputs" and side.module in readers
    }


def _reader(layer: str, module: nn.Module, block: int, mode: Compensate, columns: int) -> Reader:
    kernel = getattr(module, "kernel_size", ())
    groups, taps = int(getattr(module, "groups", 1)), math.prod(kernel)
    shared = taps * block
    mixed = shared > 1 and columns % block == 0 and (mode == "channels" or columns * taps > MOST_INPUTS)
    return Reader(layer, groups, columns, taps, block if mixed else 1, mixed)


def _block(of_filters: Iterable[tuple[int, ...]]) -> int:
    """The number of features of each channel in a flattened map. 1 if these are not whole blocks of equal size."""
    sets = list(of_filters)
    size = len(sets[0])
    whole = all(len(one) == size and one[0] % size == 0 and one == tuple(range(one[0], one[0] + size)) for one in sets)
    return size if whole else 1
