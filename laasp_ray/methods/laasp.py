"""LAASP: among all layers and a pool of criteria, the prune that costs the network least loss.

Source: Ghimire, Lee, Kim, Image and Vision Computing 136 (2023) 104745.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.config import PruneConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.groups import PruningGraph
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import Candidate, CandidateLoss, Decision, Ranking
from laasp_ray.search.candidates import Baseline, propose
from laasp_ray.search.evaluate import LossTask, MeasuredLoss
from laasp_ray.search.executor import Executor
from laasp_ray.search.policy import decide

OnCandidate = Callable[[int, int, CandidateLoss], None]


@dataclass(frozen=True)
class Turn:
    """One turn of the loop: the choice, the prune that carries it out, all losses, and seconds by where they went."""

    decision: Decision
    step: Plan
    ranking: Ranking
    seconds: Mapping[str, float]


def take_turn(
    model: nn.Module,
    network: NetworkState,
    example_input: torch.Tensor,
    baseline: Baseline,
    config: PruneConfig,
    executor: Executor,
    *,
    turn: int,
    on_candidate: OnCandidate,
) -> Turn:
    """Proposes, measures and chooses; `model` is `network` rebuilt, and is not changed. One dependency graph is built.

    `on_candidate` hears (how many are done, of how many, which) as losses come in. Raises SearchError when there is
    nothing to propose or nothing to choose.
    """
    clock = _Stopwatch()
    graph = PruningGraph(model, example_input, ignored=config.ignored, extra_layers=config.extra_layers)
    macs = count_macs(model, example_input)
    clock.lap("graph")
    proposals = propose(model, graph, macs, baseline, config)
    clock.lap("propose")
    # The network as it stands goes along as the last task, so that a decision can say what its prune cost.
    tasks = [LossTask(proposal.candidate.name, proposal.step) for proposal in proposals]
    tasks.append(LossTask("the network before this turn's prune", Plan.empty()))
    done = 0

    def hear(position: int, result: MeasuredLoss) -> None:
        nonlocal done
        if position < len(proposals):
            done += 1
            on_candidate(done, len(proposals), _entry(proposals[position].candidate, result))

    results = executor.measure(network, tasks, hear)
    clock.lap("evaluate")
    pairs = zip(proposals, results[:-1], strict=True)
    ranking = Ranking([_entry(proposal.candidate, result) for proposal, result in pairs])
    decision = decide(ranking, turn=turn, loss_before=results[-1].loss)
    chosen = next(
        p for p in proposals if (p.candidate.layer, p.candidate.filters) == (decision.layer, decision.filters)
    )
    return Turn(decision, chosen.step, ranking, clock.seconds)


def _entry(candidate: Candidate, result: MeasuredLoss) -> CandidateLoss:
    return CandidateLoss(candidate=candidate, loss=result.loss, images=result.images, seconds=result.seconds)


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
