"""Measures the time of a forward pass, together with the conditions of the measurement."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.cost.load import LoadMeter, MachineLoad
from laasp_ray.models.copying import deep_copy

LEAST_ROUNDS = 3
"""So many are measured, if so many are asked for, however long they take."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one forward pass of a batch: the median, and the 10th and 90th percentile as `spread`.

    `device` is the device's name. `threads` is the number of threads on the CPU. `repeats` is the number of measured
    passes. `cpu_ms` is the median of the process' CPU time, on all cores (None: an older record).
    """

    median_ms: float
    spread: tuple[float, float]
    batch_size: int
    device: str
    threads: int
    repeats: int
    cpu_ms: float | None = None

    @property
    def relative_spread(self) -> float:
        """The distance of the two percentiles, as a share of the median."""
        return (self.spread[1] - self.spread[0]) / self.median_ms if self.median_ms else 0.0


@dataclass(frozen=True)
class Conditions:
    """What `Latency` says of a measurement besides its times."""

    batch_size: int
    device: str
    threads: int


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
    passes = [torch_pass(ready(model, device), inputs_of(input_shape, batch_size, device)) for model in (first, second)]
    where = conditions(batch_size, device)
    (one, other), _ = measure_by_turns(passes, where, rounds=repeats, warmup=warmup)
    return one, other


def ready(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, in eval mode: a module may count its calls."""
    return deep_copy(model).to(device).eval()


def inputs_of(input_shape: Sequence[int], batch_size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)


def conditions(batch_size: int, device: torch.device) -> Conditions:
    """Those of a network that torch runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Conditions(batch_size, name, torch.get_num_threads())


def torch_pass(model: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> Callable[[], None]:
    """A forward pass that has ended when the function returns, with the kernels that whoever runs the network gets:
    training in this process may have asked for deterministic ones.
    """

    def run() -> None:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=_tf32()):
            _wait(inputs.device)
            model(inputs)
            _wait(inputs.device)

    return run


def measure_by_turns(
    passes: Sequence[Callable[[], object]],
    where: Conditions,
    *,
    rounds: int,
    warmup: int,
    least_s: float = 0.0,
    most_s: float = math.inf,
) -> tuple[list[Latency], MachineLoad]:
    """The latency of each of `passes`, which run by turns in every round, and the load of the machine meanwhile.

    There are `rounds`, or more until `least_s` seconds have passed. After LEAST_ROUNDS none begins that would end after
    `most_s`.
    """
    for _ in range(warmup):
        for run in passes:
            run()
    times: list[list[tuple[float, float]]] = [[] for _ in passes]
    meter, began, longest = LoadMeter(), time.perf_counter(), 0.0
    for done in itertools.count():
        started = time.perf_counter()
        elapsed = started - began
        if (done >= rounds and elapsed >= least_s) or (done >= LEAST_ROUNDS and elapsed + longest > most_s):
            break
        for run, taken in zip(passes, times, strict=True):
            taken.append(_time_once(run))
            meter.note(*taken[-1])
        longest = max(longest, time.perf_counter() - started)
    return [_summary(taken, where) for taken in times], meter.read()


def _time_once(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process on all cores."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def _tf32() -> bool:
    return bool(torch.backends.cudnn.allow_tf32)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(taken: Sequence[tuple[float, float]], where: Conditions) -> Latency:
    wall, cpu = ([1000 * seconds for seconds in column] for column in zip(*taken, strict=True))
    deciles = statistics.quantiles(wall, n=10, method="inclusive")
    return Latency(
        statistics.median(wall),
        (deciles[0], deciles[-1]),
        where.batch_size,
        where.device,
        where.threads,
        len(wall),
        statistics.median(cpu),
    )
