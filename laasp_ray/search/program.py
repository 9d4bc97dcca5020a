"""A network as a list of operations, so that it can be run once for many prunes.

A prune changes nothing before the first layer that reads a removed channel. So the network is run once. Each prune
branches off from its values and repeats only the operations that it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from laasp_ray.errors import is_out_of_memory
from laasp_ray.pruning.masked_norms import NORMS, norm_axis
from laasp_ray.pruning.masking import CannotMask, Masked, run_masked


@dataclass(frozen=True)
class CannotTrace:
    """In a program's place: why a network has none, so that its prunes are measured on pruned copies."""

    reason: str


@dataclass(frozen=True)
class Value:
    """A placeholder in an operation's arguments for the result of the operation at this position."""

    position: int


@dataclass(frozen=True)
class Operation:
    """One step of the forward pass. Position 0 is the input.

    `fresh`: the result has its own memory, which nothing else reads. `overwrite`, if not None, computes the same into
    the memory of the value `overwritten`, which no other operation reads.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = fx.immutable_collections.immutable_dict()
    reads: tuple[int, ...] = ()
    module: str = ""
    fresh: bool = False
    macs: int = 0
    bytes: int = 0
    elements: int = 0
    overwrite: Callable[..., Any] | None = None
    overwritten: int = -1


@dataclass(frozen=True)
class BranchPoint:
    """The point where prunes that reach the same layers branch off.

    `affected` are the rising positions of the operations that they change. `changed` are those of the masked layers,
    and `heads` are the masked layers that still read unchanged values. `reads` are the unchanged values that are
    needed; all of them exist after position `ready`. `macs` are those of the affected operations, for one image.
    """

    layers: frozenset[str]
    affected: tuple[int, ...]
    changed: frozenset[int]
    heads: frozenset[int]
    reads: frozenset[int]
    ready: int
    macs: int


Outcome = torch.Tensor | Exception


class Program:
    """The operations of a network, with BatchNorms folded into the convolutions before them. tracing.py makes it.

    It shares the memory of the network's parameters, and is invalid after a change to them.
    """

    def __init__(self, operations: Sequence[Operation], modules: Mapping[str, nn.Module], sized: bool) -> None:
        """`sized`: an operation reads sizes, so a batch must have exactly one row per image."""
        self._operations, self._modules, self.sized = tuple(operations), modules, sized
        self._last_reader = list(range(len(operations)))
        self._constants: set[int] = set()  # computed from parameters and buffers only, so equal for all images
        for position, operation in enumerate(operations):
            for read in operation.reads:
                self._last_reader[read] = position
            if position and self._constants.issuperset(operation.reads):
                self._constants.add(position)
        self.macs = sum(operation.macs for operation in operations)

    @property
    def has_plain_norms(self) -> bool:
        """Whether each norm over channels is exactly one of torch's, of which the axis is known in any precision."""
        return all(type(module) in NORMS for module in self._modules.values() if isinstance(module, NORMS))

    def resized(self, model: nn.Module) -> Program:
        """The program of `model`, which runs the same operations with other numbers of channels, without values: for
        branch points and multiply-accumulates, not for running.

        A layer's multiply-accumulates are its outputs at one place times its weights for one of them, at each place.
        """
        modules = dict(model.named_modules())
        operations = []
        for operation in self._operations:
            macs = operation.macs
            if macs:
                before, after = self._modules[operation.module], modules[operation.module]
                macs = macs // _macs_at_a_place(before) * _macs_at_a_place(after)
            operations.append(replace(operation, run=_without_values, macs=macs, overwrite=None))
        return Program(operations, {name: modules[name] for name in self._modules if name in modules}, self.sized)

    @torch.inference_mode()
    def in_precision(self, dtype: torch.dtype) -> Program:
        """The program in another precision, with copies of the weights. Its inputs are of that precision, too."""
        used = {operation.module for operation in self._operations if operation.module}
        modules = {name: copy.deepcopy(self._modules[name]).to(dtype) for name in used}
        operations = []
        for operation in self._operations:
            if operation.module:
                run: Callable[..., Any] = modules[operation.module]
                overwrite = operation.overwrite
                if isinstance(overwrite, nn.Module):
                    overwrite = copy.deepcopy(overwrite).to(dtype)
                operations.append(replace(operation, run=run, overwrite=overwrite))
            elif operation.reads or not operations:
                operations.append(operation)
            else:
                operations.append(replace(operation, run=_constant_in(operation.run(), dtype)))
        return Program(operations, modules, self.sized)

    def branch_point(self, layers: Collection[str]) -> BranchPoint | CannotMask:
        """The branch point of a prune that masks `layers`, or the reason why there is none."""
        changed = frozenset(p for p, operation in enumerate(self._operations) if operation.module in layers)
        missing = set(layers) - {self._operations[position].module for position in changed}
        if missing or not changed:
            return CannotMask(
                f"{min(missing)} is not called as a module of its own" if missing else "no layer reads the channels"
            )
        for operation in (self._operations[position] for position in sorted(changed)):
            if len(operation.arguments) + len(operation.keywords) > 1:
                return CannotMask(f"{operation.module} takes more than its input")
            module = self._modules[operation.module]
            if isinstance(module, NORMS) and norm_axis(module) is None:
                return CannotMask(f"{operation.module} normalises over its channels, and does more than its type does")
        affected = set(changed)
        for position, operation in enumerate(self._operations):
            if not affected.isdisjoint(operation.reads):
                affected.add(position)
        heads = frozenset(p for p in changed if affected.isdisjoint(self._operations[p].reads))
        # A head also uses the unchanged output of its own layer.
        reads = heads | {read for p in affected for read in self._operations[p].reads if read not in affected}
        return BranchPoint(
            layers=frozenset(layers),
            affected=tuple(sorted(affected)),
            changed=changed,
            heads=heads,
            reads=reads,
            ready=max(reads),
            macs=sum(self._operations[p].macs for p in affected),
        )

    def macs_until(self, position: int) -> int:
        """Multiply-accumulates of the unchanged network up to this position, for one image."""
        return sum(operation.macs for operation in self._operations[: position + 1])

    @torch.inference_mode()
    def run(
        self, images: torch.Tensor, branches: Mapping[BranchPoint, Sequence[Sequence[Masked]]], *, whole: bool
    ) -> Iterator[tuple[BranchPoint | None, int, Outcome]]:
        """The outputs for `images` of every branch and, if `whole`, of the unchanged network.

        `branches` has for each branch point the batches of masks that run together. Yields (branch point, number of the
        batch, outcome). The outcome is the outputs (masks * n, ...), mask by mask, or the error that was raised. The
        unchanged network yields (None, 0, outputs). An error that memory ran out is raised.
        """
        waiting: dict[int, list[BranchPoint]] = {}
        for branch_point in branches:
            waiting.setdefault(branch_point.ready, []).append(branch_point)
        last = len(self._operations) - 1 if whole else max(waiting, default=-1)
        read_by_branches = frozenset(read for branch_point in branches for read in branch_point.reads)
        frees = self._frees(branches, last)
        values: dict[int, Any] = {}
        for position in range(last + 1):
            operation = self._operations[position]
            overwrite = operation.overwrite is not None and operation.overwritten not in read_by_branches
            values[position] = self.perform(operation, values.__getitem__, overwrite) if position else images
            for branch_point in waiting.get(position, ()):
                for number, masks in enumerate(branches[branch_point]):
                    yield branch_point, number, self._attempt(branch_point, masks, values)
            for read in frees.get(position, ()):
                del values[read]
        if whole:
            yield None, 0, values[last]

    def peak_bytes(self, branch_points: Collection[BranchPoint], *, whole: bool) -> tuple[int, int]:
        """The most memory that values use at one time, for one image: (unchanged network, one mask of one branch)."""
        last = (
            len(self._operations) - 1
            if whole
            else max((branch_point.ready for branch_point in branch_points), default=-1)
        )
        frees = self._frees(branch_points, last)
        live = most = 0
        for position in range(last + 1):
            live += self._operations[position].bytes
            most = max(most, live)
            live -= sum(self._operations[read].bytes for read in frees.get(position, ()))
        return most, max((self._branch_bytes(branch_point) for branch_point in branch_points), default=0)

    def largest_value(self, branch_points: Collection[BranchPoint]) -> int:
        """The most elements that one value of a branch has, for one image and mask."""
        affected = {position for branch_point in branch_points for position in branch_point.affected}
        return max((self._operations[position].elements for position in affected), default=0)

    def _branch_bytes(self, branch_point: BranchPoint) -> int:
        """The most memory of a branch, for one image and mask. Unchanged values that it reads are repeated for every
        mask.
        """
        frees, live, most = self._branch_frees(branch_point), 0, 0
        for position in branch_point.affected:
            operation = self._operations[position]
            aside = sum(self._operations[read].bytes for read in operation.reads if read in branch_point.reads)
            # A masked layer needs its masked inputs, and each mask's output before they are concatenated.
            if position in branch_point.changed:
                aside = operation.bytes + sum(self._operations[read].bytes for read in operation.reads)
            live += operation.bytes
            most = max(most, live + aside)
            live -= sum(self._operations[read].bytes for read in frees.get(position, ()))
        return most

    def _frees(self, branch_points: Collection[BranchPoint], last: int) -> dict[int, list[int]]:
        """Position -> the values that are not needed after it."""
        until = [min(reader, last) for reader in self._last_reader[: last + 1]]
        for branch_point in branch_points:
            for read in branch_point.reads:
                until[read] = max(until[read], branch_point.ready)
        frees: dict[int, list[int]] = {}
        for read, position in enumerate(until):
            if read != len(self._operations) - 1:
                frees.setdefault(position, []).append(read)
        return frees

    def _branch_frees(self, branch_point: BranchPoint) -> dict[int, list[int]]:
        frees: dict[int, list[int]] = {}
        for position in branch_point.affected[:-1]:
            frees.setdefault(self._last_reader[position], []).append(position)
        return frees

    def _attempt(self, branch_point: BranchPoint, masks: Sequence[Masked], unchanged: Mapping[int, Any]) -> Outcome:
        try:
            return self._branch(branch_point, masks, unchanged)
        except Exception as error:  # the network's own code may raise any error; it is the candidate's error
            if is_out_of_memory(error):
                raise
            return error.with_traceback(None)  # the traceback's frames hold the branch's values

    def _branch(self, branch_point: BranchPoint, masks: Sequence[Masked], unchanged: Mapping[int, Any]) -> torch.Tensor:
        frees = self._branch_frees(branch_point)
        values: dict[int, Any] = {}
        times = len(masks)

        def value(position: int) -> Any:
            if position in values:
                return values[position]
            shared = unchanged[position]
            many = times > 1 and isinstance(shared, torch.Tensor) and position not in self._constants
            return torch.cat([shared] * times) if many else shared  # unlike repeat it keeps channels last

        for position in branch_point.affected:
            operation = self._operations[position]
            if position in branch_point.changed:
                source = (unchanged if position in branch_point.heads else values)[operation.reads[0]]
                output = unchanged[position] if position in branch_point.heads else None
                values[position] = self._deaf(operation.module, masks, source, output)
                del source, output
            else:
                overwrite = operation.overwrite is not None and operation.overwritten in values
                values[position] = self.perform(operation, value, overwrite)
            for read in frees.get(position, ()):
                del values[read]
        return values[branch_point.affected[-1]]

    def _deaf(
        self, layer: str, masks: Sequence[Masked], inputs: torch.Tensor, output: torch.Tensor | None
    ) -> torch.Tensor:
        """A layer's outputs, mask by mask. `output` is the unchanged one; it is given if all masks read the same
        `inputs`.
        """
        module, channels = self._modules[layer], [mask[layer] for mask in masks]
        if output is not None:
            parts = [run_masked(module, inputs, gone, output) for gone in channels]
        else:
            rows = inputs.chunk(len(masks))
            parts = [run_masked(module, some, gone) for some, gone in zip(rows, channels, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def perform(self, operation: Operation, value: Callable[[int], Any], overwrite: bool) -> Any:
        def resolve(item: Any) -> Any:
            return value(item.position) if isinstance(item, Value) else item

        arguments = fx.node.map_aggregate(operation.arguments, resolve)
        keywords = fx.node.map_aggregate(operation.keywords, resolve)
        run = operation.overwrite if overwrite and operation.overwrite is not None else operation.run
        return run(*arguments, **keywords)


def _macs_at_a_place(layer: nn.Module) -> int:
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(outputs, int)
    return outputs * layer.get_parameter("weight")[0].numel()


def _constant_in(value: Any, dtype: torch.dtype) -> Callable[[], Any]:
    """Returns a constant of the network, in this precision if it is a tensor of floats."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    constant = value.to(dtype) if is_float else value
    return lambda: constant


def _without_values(*_: Any, **__: Any) -> Any:
    raise AssertionError("a resized program is not run")
