"""One iteration: what is told as it goes, and what becomes of candidates that cannot be measured."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from fakes import FakeExecutor
from helpers import first_standing
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.errors import ExhaustedError, SearchError
from laasp_ray.methods.laasp import Laasp
from laasp_ray.methods.memory import IterationMemory
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.records import MeasuredLoss

CONFIG = LaaspConfig(flops_reduction=0.5, step=0.2, criteria=("l1", "cosine"))


class TellingExecutor(FakeExecutor):
    """Tells what it was given: `script` are shares (floats) and (position, result) pairs, in the order of telling."""

    def __init__(self, script):
        self._script = script

    def measure(self, network, tasks, on_result, on_share, images=None, memory=None):
        results = [MeasuredLoss(1.0, 10, 0.0)] * len(tasks)
        for item in self._script(len(tasks)):
            if isinstance(item, float):
                on_share(item)
            else:
                results[item[0]] = item[1]
                on_result(*item)
        return results


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).eval()


def iteration_of(network, script):
    heard = []
    now = first_standing(
        network,
        torch.zeros(1, 1, 8, 8),
        CONFIG,
        TellingExecutor(script),
        lambda done, total, entry: heard.append((done, total, entry)),
    )
    return Laasp().iterate(dataclasses.replace(now, iteration=4)), heard


def ok(loss, **more):
    return MeasuredLoss(loss, 10, 0.0, **more)


def test_results_are_counted_up_to_the_number_of_candidates_the_unpruned_network_not_among_them(network):
    iteration, heard = iteration_of(network, lambda tasks: [(p, ok(1 + p)) for p in reversed(range(tasks))])
    total = len(iteration.ranking)
    assert total > 3
    assert [(done, of) for done, of, _ in heard] == [(number, total) for number in range(1, total + 1)]
    assert [entry.loss for _, _, entry in heard] == [1.0 + p for p in reversed(range(total))]
    assert iteration.decision.loss == 1.0
    assert iteration.decision.loss_before == 1.0 + total
    assert iteration.decision.iteration == 4


def test_iterations_that_remember_propose_what_those_that_begin_anew_propose(network):
    """Three prunes: graph, multiply-accumulates and scores follow from the iteration before, or are all made anew."""

    class Rising(FakeExecutor):
        def measure(self, network, tasks, on_result, on_share, images=None, memory=None):
            return [MeasuredLoss(1.0 + position, 10, 0.0) for position in range(len(tasks))]

    first = first_standing(network, torch.zeros(1, 1, 8, 8), CONFIG, Rising())
    shown = []
    for forget in (False, True):
        now, rankings = first, []
        for number in range(1, 4):
            now = dataclasses.replace(now, iteration=number, memory=IterationMemory() if forget else first.memory)
            result = Laasp().iterate(now)
            rankings.append((list(result.ranking), result.decision, result.step))
            model = copy.deepcopy(now.model)
            apply_plan(model, result.step)
            state = capture(model, now.network.plan.then(result.step))
            now = dataclasses.replace(now, model=model, network=state)
        shown.append(rankings)
    assert shown[0] == shown[1]
    assert first.memory.graphs.made == 1


def test_shares_are_told_in_candidates_and_the_count_never_goes_back(network):
    def script(tasks):
        results = [(position, ok(1 + position)) for position in range(tasks)]
        return [0.0, 0.5, 0.5, *results[:1], 0.8, *results[1:-1], 1.0, results[-1]]

    iteration, heard = iteration_of(network, script)
    total = len(iteration.ranking)
    half, most = int(0.5 * total), int(0.8 * total)
    expected = [(half, False), (half, True), (most, False), *((max(most, n), True) for n in range(2, total + 1))]
    assert [(done, entry is not None) for done, _, entry in heard] == expected
    assert [done for done, _, _ in heard].count(total) == 1


def test_a_candidate_that_failed_is_left_out_with_a_warning(network, caplog):
    failed = MeasuredLoss(math.nan, 10, 0.0, error="RuntimeError: broken")
    with caplog.at_level(logging.WARNING):
        iteration, heard = iteration_of(
            network, lambda tasks: [(0, failed), *((p, ok(2 + p)) for p in range(1, tasks))]
        )
    entry = iteration.ranking[-1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{entry.candidate.name} is left out: RuntimeError: broken"
    ]
    assert (entry.error, iteration.decision.loss) == ("RuntimeError: broken", 3.0)
    assert heard[-1][0] == len(iteration.ranking)


def test_a_iteration_in_which_all_failed_ends_with_the_first_ones_error(network):
    def script(tasks):
        return [(p, MeasuredLoss(math.nan, 10, 0.0, error=f"RuntimeError: number {p}")) for p in range(tasks - 1)]

    with pytest.raises(SearchError, match=r"no candidate's loss could be measured; 0 by l1 \(.* number 0"):
        iteration_of(network, script)


def test_candidates_measured_on_copies_are_told_with_the_reasons(network, caplog):
    def script(tasks):
        reasons = ["norm over channels", "norm over channels", "a view"]
        return [(p, ok(1 + p, copied=reasons[p] if p < 3 else "")) for p in range(tasks)]

    with caplog.at_level(logging.INFO, logger="laasp_ray.methods.laasp"):
        iteration, _ = iteration_of(network, script)
    assert [record.getMessage() for record in caplog.records] == [
        f"3 of {len(iteration.ranking)} candidates were measured on pruned copies, which is slower than masks: "
        "2 because norm over channels; 1 because a view"
    ]


def test_nothing_is_said_of_copies_where_there_are_none(network, caplog):
    with caplog.at_level(logging.INFO, logger="laasp_ray.methods.laasp"):
        iteration_of(network, lambda tasks: [(p, ok(1 + p)) for p in range(tasks)])
    assert caplog.records == []


def test_the_step_carries_out_the_decision(network):
    iteration, _ = iteration_of(network, lambda tasks: [(p, ok(5.0 - (p == 2))) for p in range(tasks)])
    assert iteration.ranking[0].loss == iteration.decision.loss == 4.0
    before = dict(network.named_modules())[iteration.decision.layer].out_channels
    (kept,) = iteration.step.tensors[f"{iteration.decision.layer}.weight"][0]
    assert sorted((*kept, *iteration.decision.filters)) == list(range(before))


def test_a_method_that_chooses_nothing_is_told_before_anything_is_measured(network):
    now = first_standing(network, torch.zeros(1, 1, 8, 8), CONFIG, executor=None)
    with pytest.raises(ExhaustedError, match="mine chose no filter in iteration 1: there is nothing to prune"):
        now.prune({}, "mine")
