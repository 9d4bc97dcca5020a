"""The checks before anything expensive starts: config, data, network and store.

Errors are raised as ConfigError, DataError or StoreError, and name the value and the remedy.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laasp_ray import models
from laasp_ray.config import PlsConfig, RunConfig
from laasp_ray.config.compat import differences, with_current_names
from laasp_ray.criteria import get as criterion_of
from laasp_ray.criteria import looks_at_data
from laasp_ray.data.examples.source import Examples, check_example_identity
from laasp_ray.data.loaders.registry import check_available
from laasp_ray.data.ordering import derive_seed
from laasp_ray.data.sources.base import SPLITS, check_splits
from laasp_ray.data.sources.identity import check_identity
from laasp_ray.data.sources.registry import ImageSource, Split
from laasp_ray.errors import ConfigError, PruningError, StoreError
from laasp_ray.export.packages import check_export
from laasp_ray.methods.base import PruningMethod
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, plain_baseline
from laasp_ray.methods.registry import check_section, method_of
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.device import this_device
from laasp_ray.models.suitable import check_suitable
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.pruning.network import NetworkState
from laasp_ray.records import RunState
from laasp_ray.run.events import RunEvent, read_event
from laasp_ray.run.state import fold
from laasp_ray.search.candidates import Baseline
from laasp_ray.store.addresses import public_data
from laasp_ray.store.journal import REMEDY, Event, Journal, started_config
from laasp_ray.store.storage import Storage
from laasp_ray.tasks import CLASSIFICATION, Classification, Task, task_of
from laasp_ray.tasks.check import check_task
from laasp_ray.train.check import check_training
from laasp_ray.train.data import open_splits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Results of the checks that the run uses again. `unpruned` has its initial weights, on the CPU.

    `begun_with` is the pruned network of another run that this run begins with. None if there is no such run, or if the
    store already has that network.
    """

    config: RunConfig
    unpruned: nn.Module
    example_input: torch.Tensor
    baseline: Baseline
    train: ImageSource | Examples
    test: ImageSource | Examples
    begun_with: NetworkState | None = None
    task: Task = CLASSIFICATION


def open_run(config: RunConfig) -> Storage:
    """Opens the run's folder. Raises ConfigError if the name belongs to a run with another config; it names those keys.

    The other config is read from the journal's first event, or from `config.json` if there is no event yet.
    """
    storage = Storage.open(config.storage).child(config.name)
    storage.check_writable()
    theirs = started_config(storage)
    if theirs is None and storage.exists("config.json"):
        theirs = stored_config(storage)
    if theirs is None:
        return storage
    ours, theirs = public_data(config.to_dict()), public_data(with_current_names(theirs))
    if listed := differences(ours, theirs):
        raise ConfigError(
            f"the run {config.name!r} in {storage.uri} was started with another config ({listed}): "
            "give the same settings to go on with it, or another --name"
        )
    return storage


def stored_config(storage: Storage) -> Mapping[str, Any]:
    """The content of `config.json` in a run's folder. Raises StoreError if it is not a JSON object."""
    return storage.read_json("config.json", "restore it from a copy, or give another --name")


def restore_config(storage: Storage) -> None:
    """Writes the journal's config to `config.json` of a started run, if the file is lost or differs."""
    config = started_config(storage)
    if config is None:
        return
    try:
        there = stored_config(storage) if storage.exists("config.json") else None
    except StoreError:
        there = None
    if there != config:
        logger.warning("%s/config.json is not what the run was started with: it is written anew", storage.uri)
        write_config(storage, config)


def write_config(storage: Storage, config: Mapping[str, Any]) -> None:
    storage.write("config.json", json.dumps(public_data(config), indent=2).encode())


def folded(journal: Journal, config: RunConfig) -> RunState:
    """The state of the run. Raises StoreError, naming the event, for an event that no run can have written."""
    seen: list[Event] = []

    def events() -> Iterator[RunEvent]:
        for event in journal.events():
            seen.append(event)
            yield read_event(event, journal.uri)

    try:
        return fold(events(), config)
    except (KeyError, TypeError, ValueError, AttributeError, PruningError) as error:
        file = f"journal/{seen[-1].sequence:06d}-{seen[-1].name}.json" if seen else "the journal"
        raise StoreError(f"{file} in {journal.uri} is damaged ({error!r}); {REMEDY}") from error


@random_state_kept()
def prepare(
    config: RunConfig,
    model: nn.Module | None = None,
    *,
    started: bool = False,
    images: Mapping[Split, Mapping[str, Any]] | None = None,
    state: RunState | None = None,
    method: PruningMethod[Any] | None = None,
    task: Task | None = None,
) -> Prepared:
    """Checks everything except the cluster. `model` is the unpruned network, if it is not built from `config.model`.

    A run that has `started` has its initial weights in the store, so their source file is not needed again. A `model`
    that is not on the CPU is copied there. `images` are the identities (data/sources/identity.py) of the images at the
    run's start. `state` is the run's current state. `method` replaces the method that the config names,
    and `task` the loss and the data.
    """
    this_device()  # raises if there is a GPU that torch cannot use
    task = task or task_of(config)
    method = method or method_of(config)
    check_section(config, method)
    check_export(config.export)
    state = state or RunState()
    train, test = _opened(config, task, images, state)
    unpruned = _on_cpu(model) if model is not None else _build(config, with_weights=not started)
    example_input = torch.zeros(1, *config.model.input_shape)
    if isinstance(train, Examples) or not isinstance(task, Classification):
        _output_of(unpruned, example_input)
        _check_needs_no_labels(config, task)
        check_task(task, unpruned, config.model.input_shape)
    else:
        _check_classes(unpruned, example_input, len(train.classes))
    if config.prunes:
        network = UnprunedNetwork(
            config=config, model=unpruned, example_input=example_input, started=started, task=task
        )
        prepared = method.prepare(network)
    else:
        check_training(unpruned, config.model.input_shape, config.train, None, task)
        prepared = Preparation(baseline=plain_baseline(unpruned, example_input))
    if method.measures_losses and config.prunes and config.search.images > len(train):
        logger.info("search.images is %d, the training set has %d: all are used", config.search.images, len(train))
    return Prepared(config, unpruned, example_input, prepared.baseline, train, test, prepared.begun_with, task)


def check_workers(config: RunConfig, train_images: int, workers: int) -> None:
    """Raises ConfigError if a worker gets fewer than two images of a batch, because BatchNorm needs two."""
    batch = config.train.global_batch(workers)
    steps = math.ceil(train_images / batch)
    smallest = train_images // steps // workers
    if smallest < 2:
        raise ConfigError(
            f"with {train_images} training images, train.batch_size {batch} and {workers} workers a "
            f"worker would get batches of {smallest}: raise train.batch_size or lower cluster.workers"
        )


def _on_cpu(model: nn.Module) -> nn.Module:
    check_suitable(model)  # a network that is not suitable may not be copyable
    tensors = itertools.chain(model.parameters(), model.buffers())
    return model if all(tensor.is_cpu for tensor in tensors) else deep_copy(model).cpu()


def _build(config: RunConfig, *, with_weights: bool) -> nn.Module:
    with random_state_kept():
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        model = models.build(config.model)
    if with_weights and config.train.pretrained is not None:
        models.load_pretrained(model, config.model, config.train.pretrained)
    check_suitable(model)
    return model


def _opened(
    config: RunConfig, task: Task, images: Mapping[Split, Mapping[str, Any]] | None, state: RunState
) -> tuple[ImageSource | Examples, ImageSource | Examples]:
    """The data of both splits, checked against the `images` with which the run began."""
    if task.data is None:
        check_available(config.data.loader)
    train, test = open_splits(config.data, task, state.places)
    for split, source in zip(SPLITS, (train, test), strict=True):
        if images and isinstance(source, Examples):
            check_example_identity(images[split], source)
        elif images:
            assert not isinstance(source, Examples)
            check_identity(images[split], source, split, state.excluded)
    if not isinstance(train, Examples) and not isinstance(test, Examples):
        check_splits(train, test, config.data.path or config.data.format)
    return train, test


def _check_needs_no_labels(config: RunConfig, task: Task) -> None:
    """Raises ConfigError if the method looks at class labels, which a task of the user's own does not have, or at
    responses that it gives wrongly.
    """
    if task.data is None or not config.prunes or isinstance(task, Classification):
        return
    wanting = [name for name in getattr(config.prune, "criteria", ()) if looks_at_data(name)]
    if isinstance(config.prune, PlsConfig):
        wanting.append(config.prune.method)
    if not wanting:
        return
    if task.responses is None:
        raise ConfigError(
            f"{wanting[0]} looks at the images' class labels, and a task of your own has none that it knows: give the "
            "loss an attribute `responses`, a callable (targets) -> numbers (n, d), such as the targets themselves; or "
            "leave it out of prune.criteria, or use another prune.method"
        )
    only_labels = [name for name in wanting if not getattr(criterion_of(name), "takes_responses", False)]
    if only_labels:
        raise ConfigError(
            f"the criterion {only_labels[0]} looks at class labels and does not say that it takes responses "
            "(takes_responses, laasp_ray.criteria.DataCriterion): leave it out of prune.criteria"
        )
    task.responses(task.trial(config.model.input_shape)[1])


def _output_of(model: nn.Module, example_input: torch.Tensor) -> Any:
    probe = deep_copy(model).eval()  # a module may store its inputs
    try:
        with torch.inference_mode():
            return probe(example_input)
    except Exception as error:
        raise ConfigError(
            f"the network does not take an input of model.input_shape {tuple(example_input.shape[1:])}: {error}"
        ) from error


def _check_classes(model: nn.Module, example_input: torch.Tensor, classes: int) -> None:
    output = _output_of(model, example_input)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise ConfigError("the network must give one tensor of shape (images, classes)")
    if output.shape[1] != classes:
        raise ConfigError(
            f"the network has {output.shape[1]} outputs, the training data {classes} classes: "
            "set model.arguments.num_classes to match, or point --data at the set that belongs to the network"
        )
