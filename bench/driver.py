"""The driver's work in an iteration of the search on ResNet-50 at 224 x 224, part by part: made anew as it was, and
followed from the iteration before as it is.

    python bench/driver.py [--iterations 5] [--threads 1]

A network of random weights is pruned step by step. Every iteration is prepared three times, on the same network:
`anew` is the way before: graph and multiply-accumulates counted anew, all scores anew and the cosines of all pairs,
the network traced and checked. `after a prune` follows from the iteration before. `after training` follows too, with
weights that have all changed: scores and the trace's check are made anew. All three must propose the same. Medians,
seconds of wall-clock and, in brackets, of CPU. bench/fanout.py models the iteration on many GPUs with them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import machine
from search import NETWORKS, randomise
from torch import nn
from torch.nn import functional

from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria.registry import CRITERIA
from laasp_ray.distributed.transfer import pack
from laasp_ray.methods.memory import IterationMemory
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan, pruned_macs
from laasp_ray.search.candidates import Baseline, Proposal, measure_baseline, propose, tasks_of
from laasp_ray.search.engine import BranchPoints
from laasp_ray.search.evaluate import ready
from laasp_ray.search.remembering import BranchPointMemory
from laasp_ray.search.tracing import trace

AFTER_A_PRUNE = "after a prune"
WAYS = ("anew", AFTER_A_PRUNE, "after training")
PARTS = ("graph", "MACs", "proposals", "trace and costs", "network rebuilt, cut, packed")
CONFIG = LaaspConfig(flops_reduction=0.5)

Seconds = tuple[float, float]
"""Wall-clock and CPU."""


@dataclass
class Measured:
    """`parts`: (way, part) -> seconds of every iteration. `worker`: those of a worker that loads the network."""

    parts: dict[tuple[str, str], list[Seconds]] = field(default_factory=dict)
    worker: list[Seconds] = field(default_factory=list)
    candidates: int = 0
    graphs_made: int = 0

    def median(self, way: str, part: str) -> Seconds:
        return _median(self.parts[way, part])

    def total(self, way: str) -> Seconds:
        """The median of the iterations' sums."""
        iterations = zip(*(self.parts[way, part] for part in PARTS), strict=True)
        return _median([(sum(wall for wall, _ in parts), sum(cpu for _, cpu in parts)) for parts in iterations])


class Clock:
    """Seconds of the parts of one way."""

    def __init__(self, measured: Measured, way: str) -> None:
        self._measured, self._way = measured, way

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter(), time.process_time()
        result = work()
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        self._measured.parts.setdefault((self._way, part), []).append(seconds)
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    show(measure_driver(options.iterations))
    return 0


def show(measured: Measured) -> None:
    print(f"ResNet-50, {measured.candidates} candidates; graphs made anew on the way: {measured.graphs_made}")
    print(f"| part | {' | '.join(WAYS)} | ratio |\n|{'---|' * (len(WAYS) + 2)}")
    for part in (*PARTS, "all"):
        found = [measured.total(way) if part == "all" else measured.median(way, part) for way in WAYS]
        cells = [f"{wall:.3f} ({cpu:.3f})" for wall, cpu in found]
        print(f"| {part} | {' | '.join(cells)} | {found[0][0] / found[1][0]:.1f} |")
    wall, cpu = _median(measured.worker)
    print(f"a worker, once an iteration: network rebuilt and traced {wall:.3f} ({cpu:.3f})")


def measure_driver(iterations: int) -> Measured:
    torch.manual_seed(0)
    model = build(ModelConfig(builder=NETWORKS["resnet50"].builder, input_shape=(3, 224, 224)))
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    randomise(model, images)
    unpruned, example = model.eval(), images[:1]
    measured = Measured()
    graph, macs = PruningGraph(unpruned, example), count_macs(unpruned, example)
    baseline = measure_baseline(graph, macs, CONFIG)
    memory, traces = IterationMemory(), BranchPointMemory(example)
    network = capture(unpruned, Plan.empty())
    # The first iteration has none before it.
    proposals = _followed(Clock(Measured(), ""), unpruned, network, baseline, example, memory, traces)
    for number in range(iterations):
        network = _pruned(unpruned, network, proposals[(number * 37 + 11) % len(proposals)])
        anew = _anew(Clock(measured, WAYS[0]), unpruned, network, baseline, example)
        fresh = copy.deepcopy(memory), copy.deepcopy(traces)
        proposals = _followed(Clock(measured, WAYS[1]), unpruned, network, baseline, example, memory, traces)
        # The memories of before, for the same network with other weights.
        fresh[0].scores.__init__()  # type: ignore[misc]
        fresh[1]._last = None
        trained = _followed(Clock(measured, WAYS[2]), unpruned, network, baseline, example, *fresh)
        assert anew == proposals == trained, "the ways differ"
        measured.worker.append(_worker(unpruned, network, example))
    measured.candidates, measured.graphs_made = len(proposals), memory.graphs.made - 1
    return measured


def _anew(
    clock: Clock, unpruned: nn.Module, network: NetworkState, baseline: Baseline, example: torch.Tensor
) -> list[Proposal]:
    model = _loaded(clock, unpruned, network)
    graph = clock("graph", lambda: PruningGraph(model, example))
    macs = clock("MACs", lambda: count_macs(model, example))
    with pairs_of_filters():
        proposals = clock("proposals", lambda: propose(model, graph, macs, baseline, CONFIG))

    def costs() -> None:
        branch_points = BranchPoints(model, example)
        for task in tasks_of(proposals):
            branch_points.cost(task)

    clock("trace and costs", costs)
    return proposals


def _followed(
    clock: Clock,
    unpruned: nn.Module,
    network: NetworkState,
    baseline: Baseline,
    example: torch.Tensor,
    memory: IterationMemory,
    traces: BranchPointMemory,
) -> list[Proposal]:
    model = _loaded(clock, unpruned, network)
    graph = clock("graph", lambda: memory.graphs.graph(model, network.plan, lambda: PruningGraph(model, example)))
    macs = clock("MACs", lambda: pruned_macs(baseline.macs, network.plan))
    proposals = clock("proposals", lambda: propose(model, graph, macs, baseline, CONFIG, memory=memory.scores))

    def costs() -> None:
        branch_points = traces.of(network, model)
        for task in tasks_of(proposals):
            branch_points.cost(task)

    clock("trace and costs", costs)
    return proposals


def _loaded(clock: Clock, unpruned: nn.Module, network: NetworkState) -> nn.Module:
    """What both ways do: the iteration's network for the method and for the executor, its tensors packed, and the
    network after the prune, cut and captured.
    """

    def work() -> nn.Module:
        models = [rebuild(unpruned, network).eval() for _ in range(3)]
        pack(network.tensors)
        capture(models[2], network.plan)
        return models[0]

    return clock("network rebuilt, cut, packed", work)


def _pruned(unpruned: nn.Module, network: NetworkState, proposal: Proposal) -> NetworkState:
    model = rebuild(unpruned, network)
    apply_plan(model, proposal.step)
    return capture(model, network.plan.then(proposal.step))


def _worker(unpruned: nn.Module, network: NetworkState, example: torch.Tensor) -> Seconds:
    started = time.perf_counter(), time.process_time()
    trace(ready(rebuild(unpruned, network), torch.device("cpu")), example)
    return time.perf_counter() - started[0], time.process_time() - started[1]


@contextmanager
def pairs_of_filters() -> Iterator[None]:
    """The criteria of before: `cosine` and `euclidean` with a new table of all pairs for every step."""

    def cosine(filters: torch.Tensor) -> torch.Tensor:
        directions = functional.normalize(filters.double(), dim=1)
        return (1 - directions @ directions.T).sum(dim=1).to(filters.dtype)

    def euclidean(filters: torch.Tensor) -> torch.Tensor:
        precise = filters.double()
        squares = precise.square().sum(dim=1)
        distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * precise @ precise.T).clamp_min(0).sqrt()
        return distances.sum(dim=1).to(filters.dtype)

    now = dict(CRITERIA)
    CRITERIA.update(cosine=cosine, euclidean=euclidean)
    try:
        yield
    finally:
        CRITERIA.update(now)


def _median(seconds: list[Seconds]) -> Seconds:
    walls, cpus = zip(*seconds, strict=True)
    return statistics.median(walls), statistics.median(cpus)


if __name__ == "__main__":
    sys.exit(main())
