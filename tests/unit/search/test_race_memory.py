"""What a race leaves to the next one: the losses of its choice stand for those of the network without a prune."""

import math

import numpy as np
import pytest
import torch
from test_schedule import FakeBackend, ignore, matrix

from laasp_ray.config import SearchConfig
from laasp_ray.errors import ConfigError
from laasp_ray.search.executor import settings_of
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.schedule import Settings, measure
from laasp_ray.search.stratified import FIRST_LOOK, STRATA

CANDIDATES, IMAGES = 25, 900


def race(losses, memory, **more):
    """The results, and how many images the network without a prune was measured on."""
    backend = FakeBackend(losses)
    settings = Settings(losses.shape[1], 64, racing=True, seed=3, **more)
    results = measure(backend, len(losses), settings, ignore, memory=memory)
    unpruned = [unit for unit in backend.submitted if len(losses) - 1 in unit.tasks]
    return results, sum(len(unit.images) for unit in unpruned)


def choice_of(results):
    left = [k for k, result in enumerate(results[:-1]) if result.dropped_at is None]
    return min(left, key=lambda k: results[k].loss)


def test_the_first_race_measures_the_network_and_leaves_its_choice():
    losses, memory = matrix(CANDIDATES, IMAGES), RaceMemory()
    results, unpruned = race(losses, memory)
    assert unpruned == results[-1].images == IMAGES
    assert memory.fast is False
    assert memory.losses.tolist() == losses[choice_of(results)].tolist()


def test_the_next_race_measures_it_on_the_first_look_only_and_chooses_the_same():
    first, memory = matrix(CANDIDATES, IMAGES), RaceMemory()
    results, _ = race(first, memory)
    following = matrix(CANDIDATES, IMAGES, seed=1)
    following += first[choice_of(results)] - following[-1]  # the network is the last choice, but for its rounding
    following[-1] += np.float32(1e-6)
    alone, _ = race(following, RaceMemory())
    found, unpruned = race(following, memory)
    assert FIRST_LOOK <= unpruned == found[-1].images <= FIRST_LOOK + STRATA
    assert choice_of(found) == choice_of(alone) == int(following[:-1].mean(1).argmin())
    assert found[-1].loss == pytest.approx(following[-1].mean(dtype=np.float64), abs=1e-6)
    assert found[choice_of(found)].loss == alone[choice_of(alone)].loss  # on all images
    assert memory.losses.tolist() == following[choice_of(found)].tolist()


def test_a_network_that_changed_since_is_estimated_without_bias():
    # Every image of the network lost 0.25 more than remembered: the estimate has that from the first look.
    losses = matrix(CANDIDATES, IMAGES)
    found, _ = race(losses, RaceMemory(losses[-1] - np.float32(0.25)))
    assert found[-1].loss == pytest.approx(losses[-1].mean(dtype=np.float64), abs=1e-6)
    assert choice_of(found) == int(losses[:-1].mean(1).argmin())


@pytest.mark.parametrize(
    "memory",
    [
        RaceMemory(np.zeros(IMAGES - 1, np.float32)),
        RaceMemory(np.zeros(IMAGES, np.float32), fast=True),
        RaceMemory(np.full(IMAGES, math.nan, np.float32)),
    ],
    ids=["of other images", "of another precision", "not finite"],
)
def test_what_does_not_fit_is_not_used(memory):
    losses = matrix(CANDIDATES, IMAGES)
    alone, _ = race(losses, RaceMemory())
    found, unpruned = race(losses, memory)
    assert unpruned == IMAGES
    assert [result.loss for result in found] == [result.loss for result in alone]


def test_it_can_be_turned_off():
    losses, memory = matrix(CANDIDATES, IMAGES), RaceMemory(np.zeros(IMAGES, np.float32))
    _, unpruned = race(losses, memory, racing_memory=False)
    assert unpruned == IMAGES
    assert memory.losses.tolist() == [0.0] * IMAGES  # untouched
    assert settings_of(SearchConfig(racing_memory="off"), 10, 0).racing_memory is False
    assert settings_of(SearchConfig(), 10, 0).racing_memory is True


def test_a_race_without_a_choice_leaves_nothing():
    memory = RaceMemory(np.ones(IMAGES, np.float32))
    losses = matrix(CANDIDATES, IMAGES)
    losses[:-1] = math.nan
    race(losses, memory)
    assert memory.losses is None


def test_a_search_without_a_race_leaves_nothing():
    losses = matrix(1, IMAGES)  # one candidate has nobody to race with
    memory = RaceMemory(np.ones(IMAGES, np.float32))
    race(losses, memory)
    assert memory.losses is None


def test_it_is_stored_and_restored_to_the_last_bit():
    for fast in (False, True):
        before, after = RaceMemory(np.random.default_rng(0).random(50).astype(np.float32), fast), RaceMemory()
        after.restore(before.tensors())
        assert after.losses.tolist() == before.losses.tolist()
        assert after.losses.dtype == np.float32
        assert after.fast is fast
    before.forget()
    assert before.tensors() == {}
    after.restore({})
    assert after.losses is None


def test_stored_losses_are_no_view_of_the_live_ones():
    memory = RaceMemory(np.zeros(3, np.float32))
    stored = memory.tensors()["full"]
    memory.losses[0] = 1.0
    assert torch.equal(stored, torch.zeros(3))


@pytest.mark.parametrize("growth", [1.0, 0.5, 10.5])
def test_a_growth_that_is_none_is_refused(growth):
    with pytest.raises(ConfigError, match=rf"search\.racing_growth is {growth}, must be above 1 and at most 10"):
        SearchConfig(racing_growth=growth)


def test_a_larger_growth_has_fewer_rounds():
    losses = matrix(CANDIDATES, 4000)
    rounds = {}
    for growth in (1.3, 4.0):
        results, _ = race(losses, RaceMemory(), racing_growth=growth)
        assert choice_of(results) == int(losses[:-1].mean(1).argmin())
        rounds[growth] = max(result.dropped_at or 0 for result in results)
    assert rounds[4.0] < rounds[1.3]
