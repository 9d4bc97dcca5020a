"""Latencies of a trajectory's networks. They depend on the layers' widths, not on weights, so nothing is loaded."""

from __future__ import annotations

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.methods.targets import measure_latency
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.run.events import IterationDone, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

REPEATS = 50
AIM = 0.97
"""A trajectory goes on to this share of the latency that is asked for: one low measurement ends it."""


@random_state_kept()
def to_go(config: RunConfig, ms: float) -> tuple[float, float]:
    """The median latency of the unpruned network, ms a batch of `prune.latency_batch`, and the share of it that a
    trajectory to `ms` removes.

    Raises ConfigError if it is within `ms` already.
    """
    model = models.build(config.model)
    now = measure_latency(model, model, config, repeats=REPEATS)[0].median_ms
    if now <= ms:
        raise ConfigError(f"--latency-ms {ms:g}: the unpruned network takes {now:.2f} ms already; ask for less")
    return now, 1 - AIM * ms / now


@random_state_kept()
def first_within(run: RunConfig, ms: float) -> tuple[int, float]:
    """The first iteration of the run from which on every network is within `ms`, and the latency of its network, ms.

    Each network is measured again, on its own and with more passes than the run's own measurement had. If the last one
    is not within `ms` this time, it is what is returned.
    """
    unpruned = models.build(run.model)
    plans = _plans(run)
    if not plans:
        raise SearchError(f"the run {run.name} made no prune: there is no network within {ms:g} ms")
    found: tuple[int, float] | None = None
    for number in range(len(plans), 0, -1):
        network = deep_copy(unpruned)
        apply_plan(network, plans[number - 1])
        measured = measure_latency(unpruned, network, run, repeats=REPEATS)[1].median_ms
        if measured > ms:
            return found or (number, measured)
        found = number, measured
    assert found is not None
    return found


def _plans(run: RunConfig) -> list[Plan]:
    """What is gone of the unpruned network after each iteration."""
    plans, plan = [], Plan.empty()
    for event in read_events(Journal(Storage.open(run.storage).child(run.name))):
        if isinstance(event, IterationDone) and event.step is not None:
            plan = plan.then(Plan.from_json(event.step))
            plans.append(plan)
    return plans
