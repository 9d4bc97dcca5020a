"""Latencies of a trajectory's networks. They depend on the layers' widths, not on weights, so nothing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.errors import SearchError
from laasp_ray.methods.targets import measure_latency
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.pruning.network import capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.run.events import IterationDone, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

logger = logging.getLogger(__name__)

REPEATS = 50


@random_state_kept()
def unpruned_ms(config: RunConfig) -> float:
    """The median latency of the unpruned network, ms a batch of `prune.latency_batch`."""
    model = models.build(config.model)
    return measure_latency(model, model, config, repeats=REPEATS)[0].median_ms


@random_state_kept()
def first_within(run: RunConfig, ms: float) -> int:
    """The first iteration of the run from which on every network is within `ms` when it is measured again.

    Each network is measured on its own, with more passes than the run's own measurement had. If the last one is not
    within `ms` this time, it is taken, with a warning.
    """
    unpruned = models.build(run.model)
    networks = list(_networks(unpruned, run))
    if not networks:
        raise SearchError(f"the run {run.name} made no prune: there is no network within {ms:g} ms")
    found = len(networks)
    for number in range(len(networks), 0, -1):
        measured = measure_latency(unpruned, networks[number - 1], run, repeats=REPEATS)[1].median_ms
        if measured > ms:
            if number == len(networks):
                logger.warning("the last network takes %.2f ms when it is measured again, not %g", measured, ms)
            break
        found = number
    return found


def _networks(unpruned: nn.Module, run: RunConfig) -> Iterator[nn.Module]:
    network = capture(unpruned, Plan.empty())
    for event in read_events(Journal(Storage.open(run.storage).child(run.name))):
        if isinstance(event, IterationDone) and event.step is not None:
            model, step = rebuild(unpruned, network), Plan.from_json(event.step)
            apply_plan(model, step)
            network = capture(model, network.plan.then(step))
            yield rebuild(unpruned, network)
