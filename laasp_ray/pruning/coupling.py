"""The channels that are coupled to each filter of each layer, found in one run of the network (flow.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from laasp_ray.errors import PruningError, describe_error, is_out_of_memory
from laasp_ray.pruning.channels import CannotPrune, ChannelAxis, describe, parameter_side
from laasp_ray.pruning.flow import Flow, Follower, Meeting, tensors_of
from laasp_ray.pruning.labels import along

_NORMS = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Coupling:
    """For every side that is coupled to a layer's filters: filter -> channels there.

    `own` is the class of each filter. `places` are the sides' positions among all sides of the network. The sides are
    in the order of the first filter that they belong to, then of their places.
    """

    sides: Mapping[ChannelAxis, Mapping[int, tuple[int, ...]]]
    blocks: int
    own: np.ndarray
    places: tuple[int, ...]

    def removal(self, filters: Sequence[int]) -> dict[ChannelAxis, set[int]]:
        return {
            side: {channel for index in filters for channel in channels.get(index, ())}
            for side, channels in self.sides.items()
        }

    def classes(self, filters: Sequence[int]) -> np.ndarray:
        """The classes of the channels that are coupled to these filters."""
        return self.own[list(filters)]


class Couplings:
    """The coupling of every layer of `probe`, a network in eval mode. Its tensors must not be changed meanwhile.

    `frozen` names modules that keep their own channels. `classes` has the class of every channel number of the run.
    `meetings` are the operations in which channels disappear. `cut`: whether the network cuts its channels into blocks.
    Raises PruningError if the network does not run.
    """

    def __init__(self, probe: nn.Module, example: torch.Tensor, frozen: set[str]) -> None:
        self._frozen = frozen
        self._flow = flow = Flow()
        self._sides: list[tuple[ChannelAxis, np.ndarray]] = []
        self._grouped: dict[tuple[str, str], np.ndarray] = {}
        self._own: dict[str, tuple[ChannelAxis, np.ndarray] | CannotPrune] = {}
        self._names = {name: names[0] for names in _names_of_tensors(probe).values() for name in names}
        self._describe(probe)
        refused = {name: own.reason for name, own in self._own.items() if isinstance(own, CannotPrune)}
        self.outputs = _run(probe, example, flow, self._grouped, refused)
        self.cut = bool(flow.blocks)
        constants = "its filters meet constants, of which the network's code fixes how many"
        flow.stuck += [(numbers, constants) for numbers in flow.channels.unmet if len(numbers)]
        self.meetings: Sequence[Meeting] = flow.meetings
        self.classes = flow.channels.classes()
        self._add_meetings(probe)
        self._entries = _Entries([line for _, line in self._sides], self.classes)
        cut = [(line, count, what) for line, count, what in flow.blocks]
        cut += [
            (line, side.blocks, f"the {side.role} of {side.module}") for side, line in self._sides if side.blocks > 1
        ]
        self._blocks = cut
        self._block_entries = _Entries([line for line, _, _ in cut], self.classes)
        self._stuck: dict[int, str] = {}
        for numbers, reason in flow.stuck:
            for found in np.unique(self.classes[numbers[numbers > 0]]).tolist():
                self._stuck.setdefault(found, reason)

    def of(self, layer: str) -> Coupling | CannotPrune:
        """The channels that are coupled to the layer's filters, or the reason why these cannot be removed."""
        own = self._own[layer]
        if isinstance(own, CannotPrune):
            return own
        side, line = own
        if side.size == 1:
            return CannotPrune("one filter left")
        if self._names[f"{layer}.weight"] not in self._flow.used:
            return CannotPrune("is not part of the forward pass")
        classes = self.classes[line]
        for found in classes.tolist():
            if found in self._stuck:
                return CannotPrune(self._stuck[found])
        if len(np.unique(classes)) < len(classes):
            return CannotPrune("its filters are coupled to one another: some can only go together")
        blocks = self._blocks_of(classes)
        if isinstance(blocks, CannotPrune):
            return blocks
        if side.size % blocks:
            return CannotPrune(
                f"its {side.size} filters do not divide into the {blocks} blocks that the layers around it need"
            )
        if side.size == blocks:
            return CannotPrune(f"one filter left in each of its {blocks} blocks")
        sides: dict[ChannelAxis, dict[int, tuple[int, ...]]] = {}
        positions: dict[ChannelAxis, int] = {}
        for index, found in enumerate(classes.tolist()):
            for where, places in self._entries.of(found).items():
                side = self._sides[where][0]
                sides.setdefault(side, {})[index] = tuple(places)
                positions.setdefault(side, where)
        return Coupling(sides, blocks, classes, tuple(positions.values()))

    @property
    def has_distinct_sides(self) -> bool:
        """Whether no two sides of the network look the same, so that a side tells which channels are meant."""
        return len({side for side, _ in self._sides}) == len(self._sides)

    def _blocks_of(self, classes: np.ndarray) -> int | CannotPrune:
        """The number of blocks of a layer's filters, or the reason why no number fits."""
        blocks = 1
        counts: dict[int, dict[int, np.ndarray]] = {}
        for index, found in enumerate(classes.tolist()):
            for where, places in self._block_entries.of(found).items():
                line, count, _ = self._blocks[where]
                width = len(line) // count
                counts.setdefault(where, {})[index] = np.bincount(np.array(places) // width, minlength=count)
        for where, by_filter in counts.items():
            line, count, what = self._blocks[where]
            table = np.stack(list(by_filter.values()))
            if (table == table[:, :1]).all():
                continue  # each filter has the same number of channels in every block
            whole = len(by_filter) == len(classes) and int(table.sum()) == len(line) and len(classes) % count == 0
            width = len(classes) // count
            inside = np.zeros_like(table)
            if whole:
                inside[np.arange(len(classes)), np.arange(len(classes)) // width] = len(line) // len(classes)
            if not whole:
                return CannotPrune(f"its filters are only a part of {what}, which has {count} groups")
            if not (table == inside).all():
                return CannotPrune(f"its filters are spread over {what}, whose {count} groups must lose as many each")
            blocks = math.lcm(blocks, count)
        return blocks

    def _describe(self, probe: nn.Module) -> None:
        """Numbers the channels of all parameters and buffers. Ties the axes of one module that belong to the same
        channels.
        """
        modules = dict(probe.named_modules(remove_duplicate=False))
        tensors = dict(_tensors(probe))
        described = {
            name: [describe(name, module, inputs=inputs) for inputs in (False, True)]
            for name, module in modules.items()
        }
        kernels = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd)}
        for name, tensor in tensors.items():
            if self._names[name] == name:
                for axis, size in enumerate(tensor.shape):
                    if size > 1 and not (name in kernels and axis > 1):
                        self._flow.add_line(name, axis, size)
        covered: set[tuple[str, int]] = set()
        for name, found in described.items():
            for side in dict.fromkeys(item for item in found if isinstance(item, ChannelAxis)):
                line = self._line(side)
                self._sides.append((side, line))
                if side.role == "filters":
                    self._own[name] = (side, line)
                if name in self._frozen and side.role != "inputs":
                    self._flow.stuck.append((line, f"is coupled to {name}, which is ignored"))
                covered |= {(axis.tensor, axis.axis) for axis in side.axes}
            if isinstance(found[0], CannotPrune):
                self._own[name] = found[0]
                self._stick_below(name, found[0].reason)
        for (name, axis), line in list(self._flow.lines.items()):
            if (name, axis) not in covered:
                self._add_parameter(name, axis, line)

    def _add_parameter(self, canonical: str, axis: int, line: np.ndarray) -> None:
        for name in (other for other, first in self._names.items() if first == canonical):
            self._sides.append((parameter_side(name, axis, len(line)), line))
            if name.rpartition(".")[0] in self._frozen:
                self._flow.stuck.append((line, f"is coupled to {name}, which is ignored"))

    def _line(self, side: ChannelAxis) -> np.ndarray:
        first, *rest = side.axes if side.axes else (None,)
        if first is None:
            return self._flow.bare.setdefault(side.module, self._flow.channels.new(side.size))
        if first.per_block:
            key = (self._names[first.tensor], side.role)
            if key not in self._grouped:
                self._grouped[key] = self._flow.channels.new(side.size)
            line = self._grouped[key]
        else:
            found = self._flow.lines.get((self._names[first.tensor], first.axis))
            line = found if found is not None else self._flow.channels.new(side.size)
        for axis in rest:
            assert axis is not None
            other = self._flow.lines.get((self._names[axis.tensor], axis.axis))
            if other is not None:
                self._flow.channels.tie_lines(line, other)
        return line

    def _stick_below(self, name: str, reason: str) -> None:
        for (tensor, _), line in self._flow.lines.items():
            if tensor.startswith(f"{name}.") if name else True:
                self._flow.stuck.append((line, reason))

    def _add_meetings(self, probe: nn.Module) -> None:
        """Adds sides without tensors: operations in which channels disappear and which no layer carries out."""
        modules = dict(probe.named_modules())
        for meeting in self.meetings:
            module = modules[meeting.module]
            if meeting.kind == "holds" and isinstance(module, _NORMS):
                continue
            reads_itself = meeting.owner and self._names.get(f"{meeting.module}.weight") == meeting.owner
            if meeting.kind == "reads" and reads_itself and isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                continue
            side = ChannelAxis(meeting.module, "channels", len(meeting.channels), 1, (), (), normalises=True)
            self._sides.append((side, meeting.channels))


class _Entries:
    """The positions of each class in several lines of channels."""

    def __init__(self, lines: Iterable[np.ndarray], classes: np.ndarray) -> None:
        lines = list(lines)
        numbers = np.concatenate([np.zeros(0, np.int64), *lines])
        which = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
        places = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(line)) for line in lines)])
        found = classes[numbers]
        order = np.argsort(found, kind="stable")
        self._classes, self._which, self._places = found[order], which[order], places[order]

    def of(self, found: int) -> dict[int, list[int]]:
        """Line -> the rising positions of this class in it."""
        start, end = np.searchsorted(self._classes, [found, found + 1])
        result: dict[int, list[int]] = {}
        for where, place in zip(self._which[start:end].tolist(), self._places[start:end].tolist(), strict=True):
            result.setdefault(where, []).append(place)
        return result


def _tensors(probe: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *probe.named_parameters(remove_duplicate=False),
        *probe.named_buffers(remove_duplicate=False),
    ]


def _names_of_tensors(probe: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter or buffer, by the tensor's id."""
    names: dict[int, list[str]] = {}
    for name, tensor in _tensors(probe):
        names.setdefault(id(tensor), []).append(name)
    return names


@torch.no_grad()
def _run(
    probe: nn.Module,
    example: torch.Tensor,
    flow: Flow,
    grouped: dict[tuple[str, str], np.ndarray],
    refused: Mapping[str, str],
) -> list[torch.Tensor]:
    """Runs the network and fills `flow`. Returns the network's outputs."""
    with torch.random.fork_rng(devices=[]), Follower(probe, flow, grouped, refused) as follower:
        for dim in range(1, 2 if example.ndim > 3 else example.ndim):
            line = flow.channels.new(example.shape[dim])
            flow.stuck.append((line, "its filters meet the channels of the network's input"))
            follower.set(example, [*follower.get(example), along(line, dim, example.ndim)])
        try:
            output = probe(example)
        except Exception as error:  # the network's own code can raise any error
            if is_out_of_memory(error):
                raise
            where = f" in {follower.module}" if follower.module else ""
            raise PruningError(
                f"the network cannot be traced with an input of shape {tuple(example.shape)}: it fails{where} "
                f"({describe_error(error)})"
            ) from error
    outputs = list(tensors_of(output))
    if not outputs:
        raise PruningError(
            f"the network gives a {type(output).__name__}, in which there are no tensors: have it give a tensor, or a "
            "tuple, list or dict of tensors"
        )
    labels = [label for tensor in outputs for label in follower.get(tensor)]
    follower.stick(labels, "its filters are outputs of the network")
    return outputs
