"""The spread importance, with workers in this process: what is asked for, when, and what is added up."""

import pickle

import pytest
import ray
import torch
from fake_ray import FakeRay
from torch import nn

from laasp_ray.config import ClusterConfig, LaaspConfig
from laasp_ray.criteria.pls import Pls
from laasp_ray.distributed import importance as spread_importance
from laasp_ray.distributed import search_workers
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import SearchWorkers
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.search.activations import ImportanceRequest, chunks_of, importance
from laasp_ray.search.evaluate import CalibrationSet

WANTED = ImportanceRequest(("0", "2"), "pls", Pls(2, "max"))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


@pytest.fixture
def calibration():
    return CalibrationSet(torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(90) % 3, 5)


def own(name):
    """A criterion of the user's own, by import path."""
    return ImportanceRequest.of(WANTED.layers, f"own_criteria:{name}", LaaspConfig(flops_reduction=0.5))


def spread(monkeypatch, network, calibration, slots, wanted=WANTED, cluster=None):
    class Process:
        def network(self, *inputs):
            assert inputs == ("unpruned", "iteration", "calibration")
            return network, calibration

    cluster = cluster or FakeRay(slots)
    monkeypatch.setattr(search_workers, "ray", cluster)
    monkeypatch.setattr(spread_importance, "ray", cluster)
    monkeypatch.setattr(spread_importance, "PROCESS", Process())
    workers = SearchWorkers(plan_resources({"CPU": slots}, ClusterConfig()), cluster.clock)
    return spread_importance.spread(workers, ["unpruned", "iteration", "calibration"], wanted, chunks_of(90, 5))


@pytest.mark.parametrize("slots", [1, 2, 5, 100])
def test_any_number_of_workers_gives_the_serial_importance_to_the_last_bit(monkeypatch, network, calibration, slots):
    cluster = FakeRay(slots)
    found = spread(monkeypatch, network, calibration, slots, cluster=cluster)
    serial = importance(network, calibration, WANTED)
    assert found.keys() == serial.keys()
    assert all(torch.equal(found[layer], serial[layer]) for layer in serial)
    assert len(cluster.actors) == slots
    assert cluster.most <= 2 * slots + slots  # no more chunks at a time than keep the workers busy, and the workers


def test_a_chunk_that_is_lost_names_the_remedy(monkeypatch, network, calibration):
    class Lost(FakeRay):
        def get(self, reference):
            if len(self.ran) > 4 and reference.is_job:
                raise ray.exceptions.RayActorError()
            return super().get(reference)

    with pytest.raises(SearchError, match=r"a look at filters' outputs was not finished .* 6 times\).*prune\.pooling"):
        spread(monkeypatch, network, calibration, 1, cluster=Lost(1))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_criterion_of_the_user_s_own_is_spread_like_the_first(monkeypatch, network, calibration, slots):
    wanted = own("MeanActivation")
    found = spread(monkeypatch, network, calibration, slots, wanted)
    serial = importance(network, calibration, wanted)
    assert all(torch.equal(found[layer], serial[layer]) for layer in wanted.layers)
    assert all(values.std() > 0 for values in found.values())


def test_a_criterion_that_a_worker_cannot_load_is_refused():
    request = pickle.dumps(own("MeanActivation")).replace(b"own_criteria", b"no_criteria!")
    with pytest.raises(ConfigError, match=r"cannot load criterion 'a:B': ModuleNotFoundError: .*--working-dir"):
        spread_importance.first_batch_task([], ("a:B", request))


def test_a_state_that_cannot_travel_is_refused(monkeypatch, network, calibration):
    with pytest.raises(ConfigError, match=r"'own_criteria:Unpicklable' has a state that cannot be pickled: .*lock"):
        spread(monkeypatch, network, calibration, 1, own("Unpicklable"))
