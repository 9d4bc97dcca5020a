"""Compares a run's pruned network with its unpruned one: accuracy, multiply-accumulates, parameters, latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laasp_ray import models
from laasp_ray.config import DataConfig, ExportConfig, ModelConfig
from laasp_ray.config.fields import build
from laasp_ray.config.names import is_import_path
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.sources.base import ImageSource, check_classes, check_outputs
from laasp_ray.data.sources.registry import open_test_source
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.export.latency import EngineLatency, measure_engines
from laasp_ray.models.device import this_device
from laasp_ray.records import Metrics, to_json
from laasp_ray.run.beginning import differing_parts
from laasp_ray.run.events import started
from laasp_ray.run.metrics import noun_of
from laasp_ray.run.preflight import stored_config
from laasp_ray.store.artifact import load_pruned
from laasp_ray.store.checkpoint import UNPRUNED, load_checkpoint
from laasp_ray.store.journal import Journal, started_config
from laasp_ray.store.storage import Storage
from laasp_ray.tasks import Classification, Task
from laasp_ray.tasks.registry import task_from
from laasp_ray.train.data import EvaluationData
from laasp_ray.train.loop import evaluate

LATENCY = ExportConfig()
"""All engines, at batch 1 and 64."""


@dataclass(frozen=True)
class Measured:
    """One network. `macs` are for one input."""

    name: str
    metrics: Metrics
    macs: int
    parameters: int


@dataclass(frozen=True)
class Evaluation:
    """Both networks of a run, on the test `noun`; their latency: a row for each engine and batch, measured by turns."""

    unpruned: Measured
    pruned: Measured
    latency: tuple[EngineLatency, ...]
    noun: str = "images"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The parts of a run's config that its evaluation uses. The other parts may name code, so they are not read."""

    model: ModelConfig
    data: DataConfig
    loss: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


def evaluate_run(
    folder: str | Path,
    *,
    data: str | None = None,
    data_format: str | None = None,
    batch_size: int = 100,
    latency: ExportConfig = LATENCY,
    trust: bool = False,
    task: Task | None = None,
) -> Evaluation:
    """Measures the unpruned network, with its weights just before the first prune, and the pruned network.

    Both are the same network if nothing was pruned. `folder` is the folder of a finished run, local or on object
    storage. `data` and `data_format` replace the data set's path and format; only the test images are needed. The
    evaluation is in float32, on the GPU if there is one. `latency` says which engines time both networks, and how. A
    builder or a data format that the folder names by import path is used only with `trust`, because that runs code; so
    are data, loss and metrics of the run's own. `task` replaces those (laasp_ray.tasks.task_of), and must be given if
    they were Python objects: with the same loss and metrics, and with the same or other data. Raises ConfigError
    without `trust`, for another loss or other metrics, and for `data` or `data_format` with data of the run's own;
    StoreError if the folder holds no finished run.
    """
    storage = Storage.open(str(folder))
    config = settings_of(storage)
    if not trust:
        check_runs_no_code(_code_of(config, with_format=data_format is None, with_task=task is None), storage.uri)
    images_config = config.data
    if data is not None:
        images_config = dataclasses.replace(images_config, path=data)
    if data_format is not None:
        images_config = dataclasses.replace(images_config, format=data_format)
    task = task or task_from(images_config, config.loss, config.metrics)
    _check_task(storage, task, {"--data": data, "--format": data_format})
    place = images_config.path or images_config.format
    device = this_device()
    pruned = load_pruned(storage, models.build_offline(config.model)).to(device)
    unpruned = models.build_offline(config.model)
    unpruned.load_state_dict(load_checkpoint(storage, UNPRUNED).model)
    unpruned.to(device).eval()
    test = _test_data(storage, images_config, task, lambda: _outputs(unpruned, config, device), place)
    images = EvaluationData(test, images_config, batch_size=batch_size, seed=config.seed, device=device, task=task)
    try:
        metrics = [evaluate(network, images) for network in (unpruned, pruned)]
    finally:
        images.close()
    rows = measure_engines(unpruned, pruned, config.model.input_shape, latency, device)
    first, second = (
        _measured(name, network, config, device, figures)
        for name, network, figures in zip(("unpruned", "pruned"), (unpruned, pruned), metrics, strict=True)
    )
    return Evaluation(first, second, tuple(rows), noun_of(task.data))


def _check_task(storage: Storage, task: Task, replaced: Mapping[str, str | None]) -> None:
    """Raises ConfigError if `replaced`, flags of images, would be ignored, or if figures by `task` would not be of the
    run's loss and metrics. Other data are allowed.
    """
    for flag, value in replaced.items():
        if value is not None and task.data is not None:
            raise ConfigError(
                f"{flag} is {value!r}, which has no effect on a data set of the user's own (data.factory): leave "
                f"{flag} out, or give evaluate_run a task with other data, task_of(config, data=...) of laasp_ray.tasks"
            )
    start = started(Journal(storage))
    if start is None:
        return
    theirs, ours = (
        {part: value for part, value in (identity or {}).items() if part != "data"}
        for identity in (start.task, task.identity())
    )
    if listed := differing_parts(theirs, ours):
        raise ConfigError(
            f"the run in {storage.uri} had another loss or other metrics ({listed}): Python objects are not in its "
            "folder; give evaluate_run a task with them, task_of(config, data=..., loss=..., metrics=...) of "
            "laasp_ray.tasks"
        )


def _test_data(
    storage: Storage, images: DataConfig, task: Task, outputs: Callable[[], int], place: str
) -> ImageSource | Examples:
    """The test data, checked to be of the run's classes if it is classification of images."""
    if task.data is not None:
        return task.data.open("test")
    classes = _classes(storage)
    test = open_test_source(images, classes)
    check_classes(test, classes, place)
    if isinstance(task, Classification):
        check_outputs(test, outputs(), place)
    return test


def settings_of(storage: Storage) -> RunSettings:
    """The parts of a run's config that are read of a stored run. Raises StoreError if they cannot be used."""
    settings = started_config(storage)
    if settings is None and not storage.exists("config.json"):
        raise StoreError(f"{storage.uri} holds no config.json: give the folder of a run, such as runs/resnet50_digits")
    try:
        settings = stored_config(storage) if settings is None else settings
        used = {key: settings[key] for key in ("model", "data", "seed") if key in settings}
        train = settings.get("train", {})
        return build(RunSettings, used | {key: train[key] for key in ("loss", "metrics") if key in train}, "")
    except ConfigError as error:
        raise StoreError(f"the settings of the run in {storage.uri} cannot be used: {error}") from error


def _code_of(config: RunSettings, *, with_format: bool, with_task: bool) -> dict[str, str]:
    """What the run's folder names that an evaluation may import: what it is -> its name."""
    named = {"the network's builder": config.model.builder}
    if with_format:
        named["the data set's format"] = config.data.format
    if with_task:
        named |= {"its data": config.data.factory, "its collate function": config.data.collate, "its loss": config.loss}
        named |= {f"its metric {name}": path for name, path in config.metrics.items()}
    return named


def check_runs_no_code(named: Mapping[str, str], uri: str) -> None:
    """Raises ConfigError if one of these names of a run's folder is an import path: using it would run code."""
    for what, path in named.items():
        if is_import_path(path):
            raise ConfigError(
                f"the run in {uri} names {what} by import path, {path!r}, and using it would run that: look at it, and "
                "add --trust if you trust the folder"
            )


def _classes(storage: Storage) -> tuple[str, ...] | None:
    """The names of the classes that the run recorded at its start, or None. With them no training images are needed."""
    start = started(Journal(storage))
    if start is None or not start.images:
        return None
    if "classes" not in start.images["train"]:
        raise ConfigError(
            f"the run in {storage.uri} had a data set of its own, and the task given to evaluate_run has none: give "
            "task_of (laasp_ray.tasks) the data, too"
        )
    return tuple(row[0] for row in start.images["train"]["classes"])


def _outputs(network: nn.Module, config: RunSettings, device: torch.device) -> int:
    with torch.inference_mode():
        return network(torch.zeros(1, *config.model.input_shape, device=device)).shape[1]


def _measured(name: str, network: nn.Module, config: RunSettings, device: torch.device, metrics: Metrics) -> Measured:
    example = torch.zeros(1, *config.model.input_shape, device=device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Measured(name, metrics, count_macs(network, example).total, parameters)


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The figures as JSON: each network's, and `latency` with a row for each engine and batch."""
    return {key: value for key, value in to_json(evaluation).items() if key != "noun"}
