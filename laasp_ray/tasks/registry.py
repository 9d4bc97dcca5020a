"""The task of a run, from its config's import paths and from the objects given to `prune`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from laasp_ray.config import DataConfig, RunConfig
from laasp_ray.config.data import GIVEN
from laasp_ray.config.names import imported
from laasp_ray.data.examples.source import OwnData
from laasp_ray.errors import ConfigError
from laasp_ray.tasks.base import Task
from laasp_ray.tasks.classification import Classification
from laasp_ray.tasks.metrics import Mean, Metric
from laasp_ray.tasks.own import ModelLossTask, OutputLossTask

__all__ = ["GIVEN", "task_from", "task_of"]

_MODEL_PARAMETERS = ("model", "network")
"""A loss whose first parameter has one of these names runs the network itself."""


def task_of(
    config: RunConfig,
    *,
    data: OwnData | Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a run of `config`, in which the objects that are given replace import paths.

    Raises ConfigError if one of them cannot be used, or if the config says that one was given and it is missing.
    """
    task = task_from(config.data, config.train.loss, config.train.metrics, data=data, loss=loss, metrics=metrics)
    task.check_settings(config.train)
    return task


def task_from(
    images: DataConfig,
    loss_path: str = "",
    metric_paths: Mapping[str, str] | None = None,
    *,
    data: OwnData | Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Task:
    """As `task_of`, from the settings that it needs."""
    own = _data_of(images, data)
    loss = _resolved(loss_path, loss, "train.loss", "loss")
    found: Mapping[str, Any] = (metric_paths or {}) if metrics is None else metrics
    if loss is None:
        if found:
            raise ConfigError(
                f"metrics of your own ({', '.join(found)}) come with a loss of your own: without one the task is "
                "classification, whose metrics are top-1 and top-5; give a loss, or leave them out"
            )
        return Classification(own)
    by_name = {name: _metric(name, metric) for name, metric in found.items()}
    kind = ModelLossTask if _runs_model(loss) else OutputLossTask
    return kind(own, loss=loss, metrics_by_name=by_name)


def _data_of(config: DataConfig, data: OwnData | Callable[..., Any] | None) -> OwnData | None:
    if isinstance(data, OwnData):
        if not callable(data.factory):
            raise ConfigError(f"the data factory is a {type(data.factory).__name__}, must be a function or a class")
        return data
    factory = _resolved(config.factory, data, "data.factory", "data")
    if factory is None:
        return None
    collate = None if not config.collate else imported(config.collate, "data.collate")
    return OwnData(factory, dict(config.arguments), collate)


def _resolved(path: str, given: Any, key: str, argument: str) -> Any:
    """The object `given`, or the one that the import path names; None without either."""
    if given is not None:
        if path not in ("", GIVEN):
            raise ConfigError(f"{key} is {path!r}, and prune is given {argument}, too: leave one of the two out")
        if not callable(given):
            what = "a factory: a function of the split that returns a data set" if argument == "data" else "a function"
            raise ConfigError(f"the argument {argument} is a {type(given).__name__}, must be {what}")
        return given
    if path == GIVEN:
        raise ConfigError(
            f"{key} is {GIVEN!r}: the run's was a Python object; call prune(config, ..., {argument}=...) with it "
            "again, or give evaluate_run a task with it"
        )
    if not path:
        return None
    found = imported(path, key)
    return found() if inspect.isclass(found) and argument == "loss" else found


def _runs_model(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes (model, batch). Raises ConfigError if it does not take two arguments."""
    function = loss.forward if hasattr(loss, "forward") else loss
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function in C
        return False
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss, "__qualname__", type(loss).__name__)
        raise ConfigError(
            f"the loss {name}{signature} cannot be called with two arguments ({error}): it must take (outputs, "
            "targets), or (model, batch) if it runs the network itself"
        ) from error
    return next(iter(signature.parameters), "") in _MODEL_PARAMETERS


def _metric(name: str, metric: Any) -> Metric:
    if isinstance(metric, str):
        metric = imported(metric, f"train.metrics.{name}", of_any_kind=True)
    if inspect.isclass(metric):
        metric = metric()
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return Mean(metric)
    raise ConfigError(
        f"the metric {name!r} is a {type(metric).__name__}, must be a function (outputs, targets) -> (n,), or have "
        "width, sums, value and higher_is_better (laasp_ray.tasks.Metric)"
    )
