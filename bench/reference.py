"""The search as LAASP's authors do it, in plain code of our own: what bench/search.py compares with.

For every candidate, one after the other: deep-copy the network, build the dependency graph, prune the copy, run it
whole over the whole calibration set. Every criterion's pick is a candidate, whether or not another picks the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Timed:
    """`loss` of one candidate, and the seconds that its copy, graph and prune, and that its forward passes took."""

    loss: float
    pruning_s: float
    forward_s: float


def measure(
    model: nn.Module,
    layer: str,
    filters: Sequence[int],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    memory_format: torch.memory_format,
) -> Timed:
    """`model` in eval mode on the device of `images` (n, C, H, W), which are in `memory_format`."""
    import torch_pruning  # bench/gpu.py runs where it may be missing

    started = time.perf_counter()
    pruned = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(pruned, example_inputs=images[:1])
    module = pruned.get_submodule(layer)
    prune = graph.get_pruner_of_module(module).prune_out_channels
    graph.get_pruning_group(module, prune, idxs=list(filters)).prune()
    pruned.eval().to(memory_format=memory_format)  # type: ignore[call-overload]
    synchronise(images)
    between = time.perf_counter()
    loss = mean_loss(pruned, images, labels, batch_size)
    return Timed(loss, between - started, time.perf_counter() - between)


@torch.inference_mode()
def mean_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> float:
    total = 0.0
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        total += float(functional.cross_entropy(model(images[rows]), labels[rows], reduction="sum"))
    return total / len(images)


def seconds_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> float:
    """One run of a network over the whole calibration set."""
    started = time.perf_counter()
    mean_loss(model, images, labels, batch_size)
    return time.perf_counter() - started


def fastest(model: nn.Module, images: torch.Tensor, batch_sizes: Sequence[int]) -> tuple[int, torch.memory_format]:
    """The batch size and memory format at which the network is fastest."""
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = copy.deepcopy(model).eval().to(memory_format=memory_format)  # type: ignore[call-overload]
        for batch_size in batch_sizes:
            batch = images[:batch_size].contiguous(memory_format=memory_format)
            found.append((throughput(network, batch), batch_size, memory_format))
    _, batch_size, memory_format = max(found, key=lambda row: row[0])
    return batch_size, memory_format


@torch.inference_mode()
def throughput(model: nn.Module, batch: torch.Tensor, repeats: int = 5) -> float:
    """Images a second, the median of some forward passes after one that is not counted."""
    model(batch)
    synchronise(batch)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        model(batch)
        synchronise(batch)
        seconds.append(time.perf_counter() - started)
    return len(batch) / sorted(seconds)[repeats // 2]


def synchronise(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
