"""Sums for compensation, with workers in this process: the same to the last bit whatever their number."""

import pytest
import torch
from fake_ray import FakeRay
from torch import nn

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed import grams as spread_grams
from laasp_ray.distributed import search_workers
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import SearchWorkers
from laasp_ray.pruning.readers import Reader
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.grams import gram_chunks, grams, parts

READERS = (Reader("1", 1, 4, 9), Reader("3", 1, 5))


@pytest.mark.parametrize("memory", [0, 1, 20_000])
@pytest.mark.parametrize("slots", [1, 2, 5, 100])
def test_any_number_of_workers_gives_the_serial_sums_to_the_last_bit(monkeypatch, slots, memory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    calibration = CalibrationSet(torch.randn(90, 3, 8, 8), torch.zeros(90, dtype=torch.long), 5)

    class Process:
        def network(self, *inputs):
            assert inputs == ("unpruned", "iteration", "calibration")
            return model, calibration

    cluster = FakeRay(slots)
    monkeypatch.setattr(search_workers, "ray", cluster)
    monkeypatch.setattr(spread_grams, "PROCESS", Process())
    workers = SearchWorkers(plan_resources({"CPU": slots}, ClusterConfig()), cluster.clock)
    inputs = ["unpruned", "iteration", "calibration"]
    found = spread_grams.spread_grams(workers, inputs, parts(READERS, memory), gram_chunks(90, 5))
    serial = grams(model, calibration, READERS, memory)
    assert found.keys() == serial.keys() == {"1", "3"}
    assert all(torch.equal(found[layer].total, serial[layer].total) for layer in serial)
    assert found["1"].patches == 90 * 16
    assert cluster.most <= 2 * slots  # sums may be gigabytes: no more at a time than keep the workers busy
