"""The losses of many prunes of one network, image by image, on one device.

A prune that can be masked (pruning/masking.py) is a branch of the network's program (search/program.py). If a module
normalises over the removed channels, or the network cannot be traced, a physically pruned copy is measured.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from laasp_ray.config import Precision
from laasp_ray.errors import (
    ConfigError,
    MemoryShortError,
    SearchError,
    UnmaskedError,
    describe_error,
    is_out_of_memory,
)
from laasp_ray.pruning.masking import CannotMask, Masked
from laasp_ray.search.evaluate import Calibration, LossTask, pruned_copy
from laasp_ray.search.memory import in_parts, peak_bytes, retried
from laasp_ray.search.precision import computing_in
from laasp_ray.search.program import BranchPoint, CannotTrace, Program
from laasp_ray.search.tracing import checked, trace, verdict
from laasp_ray.tasks import Task

logger = logging.getLogger(__name__)

FREE_MEMORY_SHARE = 0.5
"""The share of free memory that the values of a forward pass may use, unless `search.memory_mb` is set. The rest is for
libraries' temporary memory and for the weights of copies.
"""

FAST = torch.bfloat16
"""The fast precision, with `search.precision=bfloat16`."""

MOST_ELEMENTS = 2**31 - 1
"""The most elements of a tensor that 32-bit indices reach."""


@dataclass(frozen=True)
class Losses:
    """`values` float32 (tasks, images) are NaN in the rows of failed tasks. `errors` has the reasons by task."""

    values: np.ndarray
    errors: Mapping[int, str]
    seconds: float


@dataclass(frozen=True)
class Cost:
    """The cost of an image for a task, in multiply-accumulates.

    `shared` is the part before the branch point, which other tasks share. `own` is the part after it. `copied` is the
    reason why a pruned copy is measured, or empty.
    """

    shared: int
    own: int
    copied: str = ""


class BranchPoints:
    """Finds where the prunes of a network branch off. `example` (B, ...) is any input.

    `untraced` is the reason why the network is not traced, or empty. It is found once (tracing.verdict) and then passed
    to all workers that get work on the same network. With None it is found here.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, untraced: str | None = None) -> None:
        traced: Program | CannotTrace
        if untraced is None and example.device.type == "cpu":
            traced = checked(model, example)
        else:
            untraced = verdict(model, example) if untraced is None else untraced
            traced = CannotTrace(untraced) if untraced else trace(model, example)
        self._set(traced)

    def _set(self, traced: Program | CannotTrace) -> None:
        self.program = traced if isinstance(traced, Program) else None
        self.untraced = traced.reason if isinstance(traced, CannotTrace) else ""
        self._known: dict[frozenset[str], BranchPoint | CannotMask] = {}

    def resized(self, model: nn.Module) -> BranchPoints:
        """Those of `model`, which runs the same operations with other numbers of channels. They are for finding and
        for costs, and their program cannot be run.
        """
        found = copy.copy(self)
        found._set(CannotTrace(self.untraced) if self.program is None else self.program.resized(model))
        return found

    def find(self, task: LossTask) -> BranchPoint | CannotMask:
        """The branch point of a task, or the reason why a physically pruned copy is measured."""
        if self.program is None:
            return CannotMask(self.untraced)
        if isinstance(task.mask, CannotMask):
            return task.mask
        layers = frozenset(task.mask)
        if layers not in self._known:
            self._known[layers] = self.program.branch_point(layers)
        return self._known[layers]

    def cost(self, task: LossTask) -> Cost:
        """The cost of a task. In a network that cannot be traced every task costs 1, because only relative costs
        matter.
        """
        whole = 1 if self.program is None else self.program.macs
        if task.unpruned:
            return Cost(0, whole)
        branch_point = self.find(task)
        if isinstance(branch_point, CannotMask):
            return Cost(0, whole, branch_point.reason)
        assert self.program is not None  # where branch points are
        return Cost(self.program.macs_until(branch_point.ready), branch_point.macs)


class Engine:
    """Measures prunes of `model`, which is in eval mode on the calibration set's device and is not changed.

    `memory_bytes` limits the memory of a forward pass's values (default: a share of the free memory). If memory runs
    out all the same, fewer images are processed at a time. `untraced` is as for BranchPoints, and `precision` as in
    `search.precision`. With `bfloat16` losses can also be measured `fast`, in that precision.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        *,
        memory_bytes: int | None = None,
        untraced: str | None = None,
        precision: Precision = "float32",
    ) -> None:
        self._model, self._calibration, self._precision = model, calibration, precision
        self._memory = memory_bytes or free_memory(calibration.device)
        example = calibration.at(np.arange(1))[0]
        untraced = untraced_by(calibration.task) or untraced
        self.branch_points = retried(lambda: BranchPoints(model, example, untraced), "the network, with one image,")
        self._program = self.branch_points.program
        self._fast = fast_program(self._program, example) if precision == "bfloat16" else None
        self._copy_bytes = 0  # the bytes of one image in a forward pass; measured for the first copy

    def losses(self, tasks: Sequence[LossTask], indices: np.ndarray, fast: bool = False) -> Losses:
        """The losses of `tasks` on the calibration set's images at `indices`. Batches are cut in their order. With
        `fast` they are in the fast precision, where the network can run in it.

        Raises MemoryShortError if memory runs out for a single image, UnmaskedError for a task that cannot be masked
        and has no plan.
        """
        with computing_in(self._precision):
            return self._losses(tasks, indices, fast)

    def _losses(self, tasks: Sequence[LossTask], indices: np.ndarray, fast: bool) -> Losses:
        started = time.perf_counter()
        values = np.full((len(tasks), len(indices)), np.nan, np.float32)
        errors: dict[int, str] = {}
        branches: dict[BranchPoint, list[int]] = {}
        copies, unchanged = [], []
        for position, task in enumerate(tasks):
            branch_point = self.branch_points.find(task)
            if task.unpruned:
                unchanged.append(position)
            elif isinstance(branch_point, BranchPoint):
                branches.setdefault(branch_point, []).append(position)
            else:
                copies.append(position)
        if branches or (unchanged and self._program is not None):
            program = self._fast if fast and self._fast is not None else self._program
            self._run_branches(program, tasks, branches, unchanged, indices, values, errors)
        elif unchanged:
            copies += unchanged
        size = self._copy_size(len(indices)) if copies else 0
        for position in copies:
            self._run_copy(tasks[position], position, indices, size, values, errors)
        for position in errors:
            values[position] = np.nan
        return Losses(values, errors, time.perf_counter() - started)

    def _run_branches(
        self,
        program: Program | None,
        tasks: Sequence[LossTask],
        branches: Mapping[BranchPoint, Sequence[int]],
        unchanged: Sequence[int],
        indices: np.ndarray,
        values: np.ndarray,
        errors: dict[int, str],
    ) -> None:
        assert program is not None
        size, joint = self._sizes(branches, len(indices), whole=bool(unchanged))
        dtype = FAST if program is self._fast else None

        def run(start: int, stop: int, share: float) -> None:
            images, targets = self._calibration.at(indices[start:stop])
            images = images if dtype is None else images.to(dtype)
            loss = self._calibration.task
            part = values[:, start:stop]
            masks = {
                branch_point: _cut(positions, max(1, int(share * joint)))
                for branch_point, positions in branches.items()
            }
            failed = self._run_chunk(program, tasks, masks, unchanged, images, targets, loss, part, errors)
            if failed:  # single masks show which task failed
                singly = {branch_point: _cut(positions, 1) for branch_point, positions in failed.items()}
                self._run_chunk(program, tasks, singly, (), images, targets, loss, part, errors)

        in_parts(len(indices), size, run)

    @staticmethod
    def _run_chunk(
        program: Program,
        tasks: Sequence[LossTask],
        batches: Mapping[BranchPoint, Sequence[Sequence[int]]],
        unchanged: Sequence[int],
        images: torch.Tensor,
        targets: Any,
        loss: Task,
        values: np.ndarray,
        errors: dict[int, str],
    ) -> dict[BranchPoint, list[int]]:
        """Fills `values` (tasks, images). Returns the tasks of failed batches of several masks, by branch point."""
        masks = {
            branch_point: [[_mask(tasks[p]) for p in batch] for batch in cut] for branch_point, cut in batches.items()
        }
        failed: dict[BranchPoint, list[int]] = {}
        found: list[tuple[Sequence[int], torch.Tensor]] = []
        for branch_point, number, outcome in program.run(images, masks, whole=bool(unchanged)):
            positions = unchanged if branch_point is None else batches[branch_point][number]
            if not isinstance(outcome, Exception):
                outcome = _losses_of(outcome, targets, loss, 1 if branch_point is None else len(positions))
                if branch_point is None and isinstance(outcome, Exception):
                    raise outcome
            if not isinstance(outcome, Exception):
                found.append((positions, outcome))
            elif branch_point is not None and len(positions) > 1:
                failed.setdefault(branch_point, []).extend(positions)
            else:
                errors.update((p, describe_error(outcome)) for p in positions if p not in errors)
        _fill(values, found)
        return failed

    def _sizes(
        self, branch_points: Mapping[BranchPoint, Sequence[int]], images: int, *, whole: bool
    ) -> tuple[int, int]:
        """The number of images, and of branches of one branch point, that are processed at a time.

        On a CPU branches are processed one by one: their batches are large enough, and sums have the same order
        whatever tasks are together. Raises SearchError if a single image needs more memory than there is.
        """
        program = self._program
        assert program is not None
        base, branch = program.peak_bytes(list(branch_points), whole=whole)
        size = self._images_at_a_time(base + branch, images)
        if program.sized or self._calibration.device.type == "cpu" or not branch:
            return size, 1
        largest = program.largest_value(list(branch_points))
        return size, branches_at_a_time(self._memory // size - base, branch, size * largest)

    def _run_copy(
        self,
        task: LossTask,
        position: int,
        indices: np.ndarray,
        size: int,
        values: np.ndarray,
        errors: dict[int, str],
    ) -> None:
        try:
            pruned = retried(lambda: pruned_copy(self._model, task), f"a copy of the network for {task.name}")

            def run(start: int, stop: int, share: float) -> None:
                images, targets = self._calibration.at(indices[start:stop])
                with torch.inference_mode():
                    losses = self._calibration.task.losses(pruned, images, targets)
                    values[position, start:stop] = losses.cpu().numpy()

            in_parts(len(indices), size, run)
        except (MemoryShortError, UnmaskedError):
            raise
        except Exception as error:  # a network's own code may raise any error
            if task.unpruned:
                raise
            errors[position] = describe_error(error)

    def _copy_size(self, images: int) -> int:
        if not self._copy_bytes:
            run, model, example = self._calibration.task.run, self._model, self._calibration.at(np.arange(1))
            with torch.inference_mode():
                self._copy_bytes = retried(lambda: peak_bytes(lambda: run(model, *example)), "one image")
        return self._images_at_a_time(self._copy_bytes, images)

    def _images_at_a_time(self, each: int, images: int) -> int:
        """The number of `images` that are processed at a time if each uses `each` bytes."""
        if each > self._memory:
            raise SearchError(
                f"one image needs {each / 1e6:.1f} MB of memory, {self._memory / 1e6:.1f} MB may be used: "
                "raise search.memory_mb"
            )
        return min(self._calibration.batch_size, images, self._memory // each)


@torch.inference_mode()
def fast_program(program: Program | None, example: torch.Tensor) -> Program | None:
    """The program in the fast precision, or None where the network cannot run in it. `example` (B, ...) is any
    input.
    """
    if program is None or not example.is_floating_point():
        return None
    try:
        fast = program.in_precision(FAST)
        outputs = next(fast.run(example.to(FAST), {}, whole=True))[2]
        assert not isinstance(outputs, Exception)  # the unchanged network's error is raised
        reason = "" if bool(outputs.isfinite().all()) else "its outputs there are not finite"
        reason = reason if program.has_plain_norms else "it has norms of its own"
    except Exception as error:  # the network's own code may not know the precision
        if is_out_of_memory(error):
            raise
        reason = describe_error(error)
    if reason:
        logger.info("losses are measured in float32, because the network does not run in %s: %s", FAST, reason)
    return None if reason else fast


def _in_full(outputs: Any) -> Any:
    return outputs.float() if isinstance(outputs, torch.Tensor) and outputs.dtype == FAST else outputs


def branches_at_a_time(memory: int, branch: int, largest: int) -> int:
    """The number of branches that run together, for images of which each may use `memory` bytes.

    `branch` is what one branch uses of it, and `largest` the elements of a branch's largest value, for all images. A
    value of more than MOST_ELEMENTS would be beyond the range of many of the GPU's kernels.
    """
    return max(1, min(memory // branch, MOST_ELEMENTS // max(1, largest)))


def free_memory(device: torch.device) -> int:
    """The bytes that a forward pass may use by default. On a CPU it is one core's part of the memory."""
    if device.type == "cuda":
        # What torch keeps for later is free as well. Without it every iteration would have less than the one before.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + kept) * FREE_MEMORY_SHARE)
    return int(psutil.virtual_memory().available * FREE_MEMORY_SHARE / (psutil.cpu_count() or 1))


def _losses_of(outputs: Any, targets: Any, loss: Task, branches: int) -> torch.Tensor | Exception:
    """The losses (branches, images) of outputs whose rows are those of one branch after the other, or the error of a
    loss of the user's own.
    """
    parts = [outputs] if branches == 1 else outputs.chunk(branches)
    try:
        with torch.inference_mode():  # the program's own ends with each of its outcomes
            return torch.stack([loss.losses_of(_in_full(part), targets) for part in parts])
    except ConfigError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return error.with_traceback(None)


def _fill(values: np.ndarray, found: Sequence[tuple[Sequence[int], torch.Tensor]]) -> None:
    """Writes losses (rows, images) into the rows of `values` at their positions: one copy for all, for which alone the
    device is waited for.
    """
    if not found:
        return
    rows, start = torch.cat([losses for _, losses in found]).cpu().numpy(), 0
    for positions, losses in found:
        values[positions] = rows[start : start + len(losses)]
        start += len(losses)


def untraced_by(task: Task) -> str:
    """Why a network is not traced for the loss of `task`; empty if it may be."""
    return "the loss runs the network itself" if task.runs_model else ""


def _mask(task: LossTask) -> Masked:
    assert isinstance(task.mask, Mapping)
    return {layer: task.made_up.get(layer, channels) for layer, channels in task.mask.items()}


def _cut(positions: Sequence[int], size: int) -> list[list[int]]:
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
