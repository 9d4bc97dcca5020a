"""Times the unpruned and the pruned network by turns, as torch runs them, as torch.compile does, and in onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from laasp_ray.config import Engine, ExportConfig
from laasp_ray.cost.latency import Conditions, Latency, conditions, inputs_of, measure_by_turns, ready, torch_pass
from laasp_ray.cost.load import MachineLoad, why_too_busy
from laasp_ray.cost.speedup import is_faster, why_not_faster
from laasp_ray.errors import ExportError, LaaspError, describe_error
from laasp_ray.export.network import INPUT, OUTPUT, onnx_of, onnx_session
from laasp_ray.export.packages import REMEDY, missing

ROUNDS, LEAST_S, WARMUP = 30, 0.5, 3


@dataclass(frozen=True, kw_only=True)
class EngineLatency:
    """The latency of both networks in one engine at one batch, measured by turns.

    `busy` has the reasons why the machine was too busy for the figures to mean anything; `load` is what they are
    derived from. `slower` says why the pruned network is not faster, where it is not, and what would help. If nothing
    could be measured, `failed` says why.
    """

    engine: Engine
    batch_size: int
    unpruned: Latency | None = None
    pruned: Latency | None = None
    load: MachineLoad | None = None
    busy: tuple[str, ...] = ()
    slower: str = ""
    failed: str = ""

    @property
    def note(self) -> str:
        """What has to be said beside the figures; empty if they speak for themselves."""
        if self.busy:
            return (
                f"the machine was too busy for these figures to mean anything: {'; '.join((*self.busy, *self._cpu()))}"
            )
        if self.failed:
            return f"not measured: {self.failed}"
        return f"not faster: {self.slower}" if self.slower else ""

    def _cpu(self) -> tuple[str, ...]:
        """The CPU times, which suffer less from other processes; none of a network that a GPU runs."""
        if self.unpruned is None or self.pruned is None or self.pruned.device != "cpu":
            return ()
        if self.unpruned.cpu_ms is None or self.pruned.cpu_ms is None:
            return ()
        return (f"its CPU time was {self.unpruned.cpu_ms:.3g} and {self.pruned.cpu_ms:.3g} ms a pass",)


Passes = tuple[Sequence[Callable[[], object]], Conditions]


def measure_engines(
    unpruned: nn.Module,
    pruned: nn.Module,
    input_shape: Sequence[int],
    config: ExportConfig,
    device: torch.device,
    *,
    onnx: bytes | None = None,
    compile_when_busy: bool = True,
) -> list[EngineLatency]:
    """A row for every engine and batch of `config`, of copies of the networks on `device`.

    `onnx` is the pruned network's file, if there is one. What an engine cannot do is in its rows, and never an error.
    Without `compile_when_busy` nothing is compiled, which may take minutes, if earlier figures mean nothing anyway.
    """
    is_pruned = {name: p.shape for name, p in unpruned.named_parameters()} != {
        name: p.shape for name, p in pruned.named_parameters()
    }
    networks = (unpruned, pruned)
    rows: list[EngineLatency] = []
    for engine in config.latency:
        busy = next((row.busy for row in rows if row.busy), ())
        try:
            if engine == "compile" and busy and not compile_when_busy:
                raise ExportError(f"the machine was too busy to compile for it ({busy[0]})")
            passes_for = _ENGINES[engine](networks, input_shape, device, onnx, config)
        except Exception as error:
            rows += [_not_measured(engine, batch, error) for batch in config.latency_batches]
            continue
        for batch in config.latency_batches:
            try:
                row = _row(engine, batch, *passes_for(batch), config.latency_seconds)
            except Exception as error:
                row = _not_measured(engine, batch, error)
            rows.append(_explained(row, networks, input_shape) if is_pruned else row)
    return rows


def _row(
    engine: Engine, batch: int, passes: Sequence[Callable[[], object]], where: Conditions, seconds: float
) -> EngineLatency:
    (unpruned, pruned), load = measure_by_turns(
        passes, where, rounds=ROUNDS, warmup=WARMUP, least_s=min(LEAST_S, seconds), most_s=seconds
    )
    spreads = [unpruned.relative_spread, pruned.relative_spread]
    busy = why_too_busy(load, where.threads, spreads, on_cpu=where.device == "cpu")
    return EngineLatency(engine=engine, batch_size=batch, unpruned=unpruned, pruned=pruned, load=load, busy=busy)


def _explained(row: EngineLatency, networks: tuple[nn.Module, nn.Module], input_shape: Sequence[int]) -> EngineLatency:
    """The row, with the reason if the pruned network is not faster; figures of a busy machine show nothing."""
    if row.unpruned is None or row.pruned is None or row.busy:
        return row
    if is_faster(row.unpruned.median_ms, row.pruned.median_ms):
        return row
    try:
        slower = why_not_faster(*networks, input_shape, row.batch_size)
    except Exception as error:  # a network of one's own may do anything with its layers
        slower = f"its layers cannot be looked at ({describe_error(error)})"
    return replace(row, slower=slower)


def _not_measured(engine: Engine, batch: int, error: Exception) -> EngineLatency:
    reason = str(error) if isinstance(error, LaaspError) else describe_error(error)
    return EngineLatency(engine=engine, batch_size=batch, failed=reason)


_PassesFor = Callable[[int], Passes]
_Networks = tuple[nn.Module, nn.Module]


def _eager(
    networks: _Networks, input_shape: Sequence[int], device: torch.device, onnx: bytes | None, config: ExportConfig
) -> _PassesFor:
    copies = [ready(network, device) for network in networks]

    def passes(batch: int) -> Passes:
        inputs = inputs_of(input_shape, batch, device)
        return [torch_pass(model, inputs) for model in copies], conditions(batch, device)

    return passes


def _compiled(
    networks: _Networks, input_shape: Sequence[int], device: torch.device, onnx: bytes | None, config: ExportConfig
) -> _PassesFor:
    copies = [ready(network, device) for network in networks]
    limit = _CompileLimit(config.compile_seconds)

    def passes(batch: int) -> Passes:
        # Both networks share their code, and past a limit of versions torch would run it uncompiled without a word.
        torch._dynamo.reset()
        inputs = inputs_of(input_shape, batch, device)
        runs = [torch_pass(torch.compile(model, dynamic=False), inputs) for model in copies]
        for number, run in enumerate(runs):
            limit.check(len(runs) - number)
            with limit.counted():
                run()  # the first pass compiles
        return runs, conditions(batch, device)

    return passes


class _CompileLimit:
    """Seconds that compiling may take in all. A compilation cannot be stopped, so the next is not begun if it would
    exceed them, at the time that the longest one so far took.
    """

    def __init__(self, seconds: float) -> None:
        self._most, self._spent, self._longest = seconds, 0.0, 0.0

    def check(self, networks: int) -> None:
        """Raises ExportError if there is no time to compile so many more networks."""
        if self._spent + networks * self._longest > self._most:
            raise ExportError(
                f"to compile a network took {self._longest:.0f} s, and {networks} more would exceed the "
                f"{self._most:g} s of export.compile_seconds"
            )

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the time of a compilation."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._spent, self._longest = self._spent + seconds, max(self._longest, seconds)


def _in_onnxruntime(
    networks: _Networks, input_shape: Sequence[int], device: torch.device, onnx: bytes | None, config: ExportConfig
) -> _PassesFor:
    if absent := missing():
        raise ExportError(f"it needs {', '.join(absent)}: {REMEDY}")
    unpruned, pruned = networks
    threads = torch.get_num_threads()
    files = (onnx_of(unpruned, input_shape), onnx_of(pruned, input_shape) if onnx is None else onnx)
    sessions = [onnx_session(file, threads) for file in files]
    on_gpu = "CUDAExecutionProvider" in sessions[0].get_providers()
    name = torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "cpu"

    def passes(batch: int) -> Passes:
        feed = {INPUT: inputs_of(input_shape, batch, torch.device("cpu")).numpy()}
        runs = [lambda session=session: session.run([OUTPUT], feed) for session in sessions]
        return runs, Conditions(batch, name, threads)

    return passes


_ENGINES: dict[Engine, Callable[[_Networks, Sequence[int], torch.device, bytes | None, ExportConfig], _PassesFor]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _in_onnxruntime,
}
