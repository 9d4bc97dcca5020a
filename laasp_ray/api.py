"""`from laasp_ray import prune`: a whole run, from preflight to the pruned network."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.sources.places import find_places
from laasp_ray.distributed.address import check_address
from laasp_ray.errors import ConfigError
from laasp_ray.methods import PruningMethod, method_of
from laasp_ray.methods.registry import check_section
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.device import this_device
from laasp_ray.models.suitable import check_suitable
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.records import Place
from laasp_ray.report.page.writer import PageWriter
from laasp_ray.report.progress import make_progress
from laasp_ray.report.tensorboard import ScalarWriter
from laasp_ray.run.beginning import (
    batch_parts_of,
    calibration_of,
    check_method,
    check_same_task,
    keep_unpruned,
    start_run,
)
from laasp_ray.run.controller import Controller, RunServices
from laasp_ray.run.events import (
    FaultSurvived,
    Observer,
    RunFinished,
    RunResumed,
    RunStarted,
    data_of,
    started,
)
from laasp_ray.run.preflight import Prepared, check_workers, folded, open_run, prepare, restore_config
from laasp_ray.search.calibration import Drawn, calibration_set
from laasp_ray.search.executor import Executor, InProcessExecutor
from laasp_ray.store.artifact import load_pruned
from laasp_ray.store.journal import Journal
from laasp_ray.store.ownership import take
from laasp_ray.store.storage import Storage
from laasp_ray.tasks import GIVEN, OwnData, Task, task_of
from laasp_ray.train.data import digest_of_split
from laasp_ray.train.trainer import InProcessTrainer, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneResult:
    """`model` is the pruned network, on the CPU and in eval mode. `folder` is the run's folder. `summary` is the data
    of the run's last event.
    """

    model: nn.Module
    folder: str
    summary: dict[str, Any]


@random_state_kept()
def prune(
    config: RunConfig,
    model: nn.Module | None = None,
    *,
    distributed: bool = True,
    ray_address: str | None = None,
    progress: Observer | None = None,
    method: PruningMethod[Any] | None = None,
    data: OwnData | Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> PruneResult:
    """Carries out a run. Resumes the run of that name if it is unfinished, and only loads it if it is finished.

    `model` is the unpruned network: any `nn.Module` that the dependency graph can trace. None builds `config.model`.
    With `distributed` False everything runs in this process, without Ray. With `ray_address` None the run joins the
    cluster of RAY_ADDRESS; without that variable it starts a cluster on this machine, which ends with the run. `method`
    replaces the method that `config.prune.method` names. `config.prune` must be an instance of its `config_class`.

    `data` is a function of the split ("train", "test") that returns a map-style data set, or an `OwnData` with its
    collate function; `loss` a callable (outputs, targets), or (model, batch) if the first parameter is called `model`,
    that gives one value for each example; `metrics` maps names to metrics (laasp_ray.tasks). They replace the images
    and the cross-entropy that the config describes; docs/own-task.md has examples. A resumed run needs the same
    `model`, `method`, `data`, `loss` and `metrics` again.

    Raises ConfigError, DataError or StoreError before anything expensive. Raises SearchError or TrainingError later;
    the store then has everything up to the last finished epoch or iteration.
    """
    _check_given(config, model)
    if method is not None and not config.prunes:
        raise ConfigError("a method is given to a run that prunes nothing: leave it out, or set prune.flops_reduction")
    config, task = _with_task(config, data, loss, metrics)
    storage = open_run(config)
    restore_config(storage)
    journal = Journal(storage)
    if journal.last(RunFinished.NAME) is not None:
        return _finished(config, model, storage, journal)
    # An import path that names no method, or one for another section, is refused before anything else.
    check_section(config, method or method_of(config))
    if distributed:
        check_address(ray_address)
        _check_portable(task)
    owner = take(storage, at_least=journal.last_attempt() + 1)
    try:
        storage, journal = storage.guarded(owner.ensure), Journal(storage, owner)
        if journal.last(RunFinished.NAME) is not None:  # by the driver that had the run until now
            return _finished(config, model, storage, journal)
        prepared = _prepared(config, model, journal, method, task)
        progress = progress or make_progress(config.prune.targets, sys.stderr)
        try:
            if distributed:
                run = _run_on_ray(prepared, storage, journal, progress, method, ray_address)
            else:
                run = _run_here(prepared, storage, journal, progress, method)
        finally:
            _close([progress])
        return _result(run, storage, journal)
    finally:
        owner.release()


def _result(network: nn.Module, storage: Storage, journal: Journal) -> PruneResult:
    finish = journal.last(RunFinished.NAME)
    assert finish is not None
    return PruneResult(network, storage.uri, _summary(finish.data))


def _finished(config: RunConfig, model: nn.Module | None, storage: Storage, journal: Journal) -> PruneResult:
    logger.warning("the run %r in %s is finished; nothing to do", config.name, storage.uri)
    unpruned = _copied(model) if model is not None else models.build(config.model)
    return _result(load_pruned(storage, unpruned), storage, journal)


def _prepared(
    config: RunConfig, model: nn.Module | None, journal: Journal, method: PruningMethod[Any] | None, task: Task
) -> Prepared:
    start = started(journal)
    if start is None:
        return prepare(config, model, method=method, task=task)
    check_method(start, method)
    check_same_task(start, task)
    state = folded(journal, config)
    return prepare(config, model, started=True, images=start.images, state=state, method=method, task=task)


def _with_task(
    config: RunConfig,
    data: OwnData | Callable[..., Any] | None,
    loss: Callable[..., Any] | None,
    metrics: Mapping[str, Any] | None,
) -> tuple[RunConfig, Task]:
    """The task, and the config that says which parts of it are Python objects."""
    task = task_of(config, data=data, loss=loss, metrics=metrics)
    if data is not None and not config.data.factory:
        config = replace(config, data=replace(config.data, factory=GIVEN))
    if loss is not None and not config.train.loss:
        config = replace(config, train=replace(config.train, loss=GIVEN))
    return config, task


def _check_portable(task: Task) -> None:
    if not task.own_parts():
        return
    from laasp_ray.distributed.transfer import check_portable  # it needs Ray

    check_portable(task.own_parts())


def _check_given(config: object, model: object) -> None:
    if isinstance(model, RunConfig):
        raise ConfigError(
            "prune was given its config second, as an earlier version took it: write prune(config, model), or "
            "prune(config) to have config.model built"
        )
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"prune's config is of type {type(config).__name__}, must be a RunConfig: a recipe's, recipe(name), or "
            "RunConfig.from_dict(settings)"
        )


def _summary(finish: Mapping[str, Any]) -> dict[str, Any]:
    """The last event's data, merged with the method's details."""
    return {key: value for key, value in finish.items() if key != "details"} | dict(finish.get("details", {}))


def _copied(model: nn.Module) -> nn.Module:
    check_suitable(model)
    return deep_copy(model).cpu()


def _run_here(
    prepared: Prepared, storage: Storage, journal: Journal, progress: Observer, method: PruningMethod[Any] | None
) -> nn.Module:
    config, parts = prepared.config, batch_parts_of(journal) or 1
    check_workers(config, len(prepared.train), parts)
    device = this_device()

    def executor(calibration: Drawn, trainer: Callable[[], Trainer]) -> Executor:
        images = calibration_set(calibration, config.data, config.search, prepared.task)
        return InProcessExecutor(prepared.unpruned, images, device, config.search, config.seed)

    return _control(
        prepared,
        storage,
        journal,
        progress,
        method,
        lambda: InProcessTrainer(prepared.unpruned, config, device, parts, prepared.task),
        executor,
        parts,
        "one process, without Ray",
    )


def _run_on_ray(
    prepared: Prepared,
    storage: Storage,
    journal: Journal,
    progress: Observer,
    method: PruningMethod[Any] | None,
    address: str | None,
) -> nn.Module:
    from laasp_ray.distributed import (  # Ray takes seconds to import, and a run without Ray does not need it
        autoscaling,
        cluster,
    )
    from laasp_ray.distributed.executor import RayExecutor
    from laasp_ray.distributed.trainer import RayTrainer, put_network

    config = prepared.config

    def on_fault(text: str) -> None:
        journal.append(FaultSurvived.NAME, data_of(FaultSurvived(text=text)))

    grows, known_parts = check_address(address) != "local", batch_parts_of(journal)
    with (
        cluster.connected(address) as there,
        autoscaling.with_devices(there, config.cluster, known_parts, grows=grows) as resources,
        tempfile.TemporaryDirectory(prefix="laasp_ray-train-") as scratch,
    ):
        share = cluster.plan_resources(resources, config.cluster, known_parts)
        check_workers(config, len(prepared.train), share.workers)
        network = put_network(prepared.unpruned)
        images, task = (digest_of_split(prepared.train), digest_of_split(prepared.test)), prepared.task

        def executor(calibration: Drawn, trainer: Callable[[], Trainer]) -> Executor:
            if not share.gpus:
                return RayExecutor(network, prepared.unpruned, calibration, config, share, on_fault, task=task)
            started = trainer()
            assert isinstance(started, RayTrainer)
            made = RayExecutor(network, prepared.unpruned, calibration, config, share, on_fault, started.nodes, task)
            started.start(made.make_room)  # or the search's workers could take the room of trainers that come later
            return made

        return _control(
            prepared,
            storage,
            journal,
            progress,
            method,
            lambda: RayTrainer(network, config, share, scratch, images, on_fault, task),
            executor,
            share.workers,
            _spread_over(resources, share.workers),
        )


def _spread_over(resources: Mapping[str, float], workers: int) -> str:
    """What a run on Ray is spread over, in words."""
    devices = [
        f"{int(count)} {of}{'' if count == 1 else 's'}" for of in ("GPU", "CPU") if (count := resources.get(of, 0))
    ]
    return f"Ray, {' and '.join(devices)}, {workers} trainer{'' if workers == 1 else 's'}"


def _control(
    prepared: Prepared,
    storage: Storage,
    journal: Journal,
    progress: Observer,
    method: PruningMethod[Any] | None,
    make_trainer: Callable[[], Trainer],
    make_executor: Callable[[Drawn, Callable[[], Trainer]], Executor],
    parts: int,
    workers: str,
) -> nn.Module:
    """Starts the journal if there is none, folds it, and runs the controller from that state."""
    config, owner = prepared.config, journal.owner
    assert owner is not None
    resumed = journal.last(RunStarted.NAME) is not None
    if not resumed:
        start_run(prepared, storage, journal, method, parts, workers)
    if config.prune.begins_with is not None:
        keep_unpruned(config.prune.begins_with, storage)
    made: dict[str, Any] = {}

    def trainer() -> Trainer:
        if "trainer" not in made:
            made["trainer"] = make_trainer()
        return made["trainer"]

    def executor(excluded: tuple[str, ...], on_unreadable: Callable[[str], None]) -> Executor:
        if "executor" not in made:
            made["executor"] = make_executor(calibration_of(prepared, journal, excluded, on_unreadable), trainer)
        return made["executor"]

    made["scalars"] = scalars = ScalarWriter(storage)
    made["page"] = page = PageWriter(storage)
    try:
        services = RunServices(
            trainer,
            executor,
            method or method_of(config),
            storage,
            journal,
            (progress, scalars, page),
            locate=lambda names: _places_of(names, prepared),
            attempt=owner.attempt,
        )
        state = folded(journal, config)
        if resumed:
            progress.on_event(RunResumed(), state)
        return Controller(config, prepared.unpruned, prepared.example_input, prepared.baseline, state, services).run()
    finally:
        owner.release()  # first: whoever is being stopped may have seconds only
        _close(reversed(made.values()))


def _places_of(names: Sequence[str], prepared: Prepared) -> Mapping[str, Place]:
    train, test = prepared.train, prepared.test
    assert not isinstance(train, Examples) and not isinstance(test, Examples)  # no example is ever left out
    return find_places(names, {"train": train, "test": test})


def _close(parts: Iterable[Any]) -> None:
    """Closes all parts. Logs errors instead of raising them: they must not hide the run's own error or fail a finished
    run.
    """
    for part in parts:
        try:
            part.close()
        except Exception:
            logger.warning("closing %s failed", type(part).__name__, exc_info=True)
