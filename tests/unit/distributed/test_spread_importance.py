"""The spread importance, with tasks that run in this process: what is asked for, when, and what is added up."""

import pickle

import pytest
import torch
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.criteria.pls import Pls
from laasp_ray.distributed import importance as spread_importance
from laasp_ray.distributed import tasks
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.search.activations import ImportanceRequest, chunks_of, importance
from laasp_ray.search.evaluate import CalibrationSet

WANTED = ImportanceRequest(("0", "2"), "pls", Pls(2, "max"))


class FakeRay:
    """Tasks run when they are asked for; references are the values themselves, boxed."""

    def __init__(self, lost=()):
        self.under_way, self.most, self.asked, self.cancelled = 0, 0, 0, 0
        self._lost = lost

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def remote(self, function):
        ray = self

        class Task:
            def options(self, **options):
                assert options == {"num_cpus": 0.9}
                return self

            def remote(self, *given):
                if function is spread_importance.chunk_task:
                    ray.asked += 1
                    ray.under_way += 1
                    ray.most = max(ray.most, ray.under_way)
                return [function, given]

        return Task()

    def put(self, value):
        return [None, value]

    def get(self, reference):
        function, value = reference
        if function is None:
            return value
        if function is spread_importance.chunk_task:
            self.under_way -= 1
            if self.asked in self._lost:
                raise self.exceptions.RayError("the node died")
        return function(*value)

    def cancel(self, reference, force):
        self.cancelled += 1


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


def spread(monkeypatch, network, calibration, slots, ray, wanted=WANTED):
    class Process:
        def network(self, *inputs):
            assert inputs == ("unpruned", "iteration", "calibration")
            return network, calibration

    monkeypatch.setattr(spread_importance, "ray", ray)
    monkeypatch.setattr(tasks, "ray", ray)
    monkeypatch.setattr(spread_importance, "PROCESS", Process())
    monkeypatch.setattr(spread_importance, "device", lambda: torch.device("cpu"))
    chunks = chunks_of(90, 5)
    return spread_importance.spread(["unpruned", "iteration", "calibration"], wanted, chunks, slots, {"num_cpus": 0.9})


@pytest.mark.parametrize("slots", [1, 2, 5, 100])
def test_any_number_of_workers_gives_the_serial_importance_to_the_last_bit(monkeypatch, network, calibration, slots):
    ray = FakeRay()
    found = spread(monkeypatch, network, calibration, slots, ray)
    serial = importance(network, calibration, WANTED)
    assert found.keys() == serial.keys()
    assert all(torch.equal(found[layer], serial[layer]) for layer in serial)
    # Every chunk once, and no more at a time than the slots are kept busy with.
    assert (ray.asked, ray.most, ray.cancelled) == (18, min(18, 2 * slots), 0)


def test_a_task_that_is_lost_names_the_remedy_and_the_others_are_cancelled(monkeypatch, network, calibration):
    ray = FakeRay(lost=(4,))
    with pytest.raises(SearchError, match=r"was not finished .* 6 times\): the node died.*prune\.pooling"):
        spread(monkeypatch, network, calibration, 2, ray)
    assert ray.cancelled == 3


@pytest.mark.parametrize("slots", [1, 3])
def test_a_criterion_of_the_user_s_own_is_spread_like_the_first(monkeypatch, network, calibration, slots):
    wanted = own("MeanActivation")
    found = spread(monkeypatch, network, calibration, slots, FakeRay(), wanted)
    serial = importance(network, calibration, wanted)
    assert all(torch.equal(found[layer], serial[layer]) for layer in wanted.layers)
    assert all(values.std() > 0 for values in found.values())


def test_a_criterion_that_a_worker_cannot_load_is_refused():
    request = pickle.dumps(own("MeanActivation")).replace(b"own_criteria", b"no_criteria!")
    with pytest.raises(ConfigError, match=r"cannot load criterion 'a:B': ModuleNotFoundError: .*--working-dir"):
        spread_importance.first_batch_task([], ("a:B", request))


def test_a_state_that_cannot_travel_is_refused(monkeypatch, network, calibration):
    with pytest.raises(ConfigError, match=r"'own_criteria:Unpicklable' has a state that cannot be pickled: .*lambda"):
        spread(monkeypatch, network, calibration, 1, FakeRay(), own("Unpicklable"))
