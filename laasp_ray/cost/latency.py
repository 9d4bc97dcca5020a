"""How long a forward pass takes, measured, with the circumstances that the number belongs to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.models.copying import deep_copy


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one forward pass of a batch: the median, and the 10th and 90th percentile as `spread`.

    `device` is its name, `threads` those that torch computes with on the CPU, `repeats` the passes measured.
    """

    median_ms: float
    spread: tuple[float, float]
    batch_size: int
    device: str
    threads: int
    repeats: int


def measure_pair(
    first: nn.Module,
    second: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int = 1,
    device: str | torch.device,
    repeats: int = 20,
    warmup: int = 3,
) -> tuple[Latency, Latency]:
    """Times two networks in eval mode on `device` with random inputs (batch_size, *input_shape), by turns, so that a
    drift of the machine does not favour either.

    Copies are measured there. Raises ValueError unless repeats >= 2, warmup >= 0 and batch_size >= 1.
    """
    if repeats < 2 or warmup < 0 or batch_size < 1:
        raise ValueError(f"repeats={repeats}, warmup={warmup}, batch_size={batch_size}: must be at least 2, 0 and 1")
    device = torch.device(device)
    copies = [deep_copy(model).to(device).eval() for model in (first, second)]  # a module may count its calls
    inputs = torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    times: list[list[float]] = [[], []]
    # Training in this process may have asked for deterministic kernels, which whoever runs the network does not.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=_tf32()):
        for iteration in range(warmup + repeats):
            for model, taken in zip(copies, times, strict=True):
                elapsed = _time_once(model, inputs, device)
                if iteration >= warmup:
                    taken.append(elapsed)
    return _summary(times[0], batch_size, device), _summary(times[1], batch_size, device)


def _time_once(model: nn.Module, inputs: torch.Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    model(inputs)
    _wait(device)
    return (time.perf_counter() - start) * 1000


def _tf32() -> bool:
    return bool(torch.backends.cudnn.allow_tf32)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(taken: list[float], batch_size: int, device: torch.device) -> Latency:
    deciles = statistics.quantiles(taken, n=10, method="inclusive")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Latency(
        statistics.median(taken), (deciles[0], deciles[-1]), batch_size, name, torch.get_num_threads(), len(taken)
    )
