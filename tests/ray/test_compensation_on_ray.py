"""Moments and compensated losses on Ray's workers, against the serial ones."""

import pytest
import ray
import torch
from test_importance import setting

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.executor import RayExecutor
from laasp_ray.distributed.trainer import put_network
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.executor import InProcessExecutor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_moments_statistics_and_losses_are_the_serial_ones(session, tmp_path, request):
    config, network, drawn, calibration = setting(tmp_path, images=60, batch_size=10, racing="off")
    share = plan_resources(ray.cluster_resources(), config.cluster)
    spread = RayExecutor(put_network(network), network, drawn, config, share)
    request.addfinalizer(spread.close)
    serial = InProcessExecutor(network, calibration, torch.device("cpu"), config.search, config.seed)
    example, state = torch.zeros(1, *config.model.input_shape), capture(network, Plan.empty())
    graph, macs = PruningGraph(network, example), count_macs(network, example)
    prune = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.1, compensate="full")
    found = []
    for executor in (spread, spread, serial):
        compensator = CompensationMemory().at(network, graph, "full", Measured(state), executor.grams)
        baseline = measure_baseline(graph, macs, prune)
        proposals = propose(network, graph, macs, baseline, prune, made_up=compensator.made_up)
        losses = executor.measure(state, tasks_of(proposals), lambda position, loss: None, lambda share: None)
        inverses = {layer: moments.inverse[0] for layer, moments in compensator.moments.items()}
        statistics = executor.statistics(state, ["layer3.0.conv2"])
        found.append((inverses, statistics, [loss.loss for loss in losses]))
    (first, first_statistics, losses), (again, _, losses_again), (expected, expected_statistics, serial_losses) = found
    assert losses == losses_again and all(torch.equal(first[layer], again[layer]) for layer in first)
    assert losses == pytest.approx(serial_losses, rel=1e-5)
    assert len(set(losses)) > len(losses) // 2
    for layer, inverse in expected.items():
        torch.testing.assert_close(first[layer], inverse, rtol=1e-4, atol=1e-4 * float(inverse.abs().max()))
    assert set(first_statistics) == {
        f"{norm}.{kind}"
        for norm in ("layer3.0.bn2", *(f"layer3.{block}.bn{index}" for block in (1, 2) for index in (1, 2)))
        for kind in ("running_mean", "running_var")
    }
    for name, tensor in expected_statistics.items():
        torch.testing.assert_close(first_statistics[name], tensor, rtol=0, atol=1e-6)


def test_a_race_in_two_precisions_is_the_serial_one(session, tmp_path, request):
    config, network, drawn, calibration = setting(tmp_path, images=240, batch_size=40, precision="bfloat16")
    spread = RayExecutor(
        put_network(network), network, drawn, config, plan_resources(ray.cluster_resources(), config.cluster)
    )
    request.addfinalizer(spread.close)
    serial = InProcessExecutor(network, calibration, torch.device("cpu"), config.search, config.seed)
    example, state = torch.zeros(1, *config.model.input_shape), capture(network, Plan.empty())
    graph, macs = PruningGraph(network, example), count_macs(network, example)
    prune = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.1)
    tasks = tasks_of(propose(network, graph, macs, measure_baseline(graph, macs, prune), prune))
    found = [
        executor.measure(state, tasks, lambda position, loss: None, lambda share: None) for executor in (spread, serial)
    ]
    for one, other in zip(*found, strict=True):
        assert (one.images, one.dropped_at, one.error) == (other.images, other.dropped_at, "")
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert {loss.dropped_at is None for loss in found[0]} == {True, False}
