"""What a network is trained and pruned for: its loss, its metrics and, if they are the user's own, its data."""

from __future__ import annotations

from laasp_ray.data.examples.source import OwnData
from laasp_ray.tasks.base import Task
from laasp_ray.tasks.classification import CLASSIFICATION, Classification
from laasp_ray.tasks.metrics import Mean, Metric, TopK
from laasp_ray.tasks.own import ModelLossTask, OutputLossTask
from laasp_ray.tasks.registry import GIVEN, task_of

__all__ = [
    "CLASSIFICATION",
    "GIVEN",
    "Classification",
    "Mean",
    "Metric",
    "ModelLossTask",
    "OutputLossTask",
    "OwnData",
    "Task",
    "TopK",
    "task_of",
]
