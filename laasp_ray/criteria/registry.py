"""The table of criteria by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laasp_ray.errors import ConfigError

Criterion = Callable[[torch.Tensor], torch.Tensor]
"""Weights (N, K), one row a filter -> scores (N,), lowest goes first."""

CRITERIA: dict[str, Criterion] = {}


def register(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator that makes a criterion known under `name`; raises ConfigError if the name is taken."""

    def keep(criterion: Criterion) -> Criterion:
        if CRITERIA.setdefault(name, criterion) is not criterion:
            raise ConfigError(f"a criterion {name!r} is registered already; choose another name")
        return criterion

    return keep
