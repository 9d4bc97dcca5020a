"""The methods: what to prune next, given the network as it stands. Each is one object, made from a run's config."""

from __future__ import annotations

from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.registry import method_of

__all__ = ["IterationContext", "IterationResult", "PruningMethod", "method_of"]
