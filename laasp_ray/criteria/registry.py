"""The table of criteria by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from laasp_ray.criteria.of_data import DataCriterion, checked
from laasp_ray.errors import ConfigError

Criterion = Callable[[torch.Tensor], torch.Tensor]
"""Weights (N, K), one row for each filter -> scores (N,). The lowest scores are pruned first."""
AnyCriterion = Criterion | type[DataCriterion[Any]] | DataCriterion[Any]
"""A criterion of weights, or a criterion of data as an object or a class."""
Registered = TypeVar("Registered", bound=AnyCriterion)

CRITERIA: dict[str, AnyCriterion] = {}


def register(name: str) -> Callable[[Registered], Registered]:
    """Decorator that makes a criterion known under `name`; raises ConfigError if the name is taken."""

    def keep(criterion: Registered) -> Registered:
        if CRITERIA.setdefault(name, checked(name, criterion)) is not criterion:
            raise ConfigError(f"a criterion {name!r} is registered already; choose another name")
        return criterion

    return keep
