"""The methods: what to prune next, given the network as it stands. One seam, an iteration of each."""

from __future__ import annotations

from collections.abc import Mapping

from laasp_ray.config import Method
from laasp_ray.methods import laasp, pls
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod

__all__ = ["METHODS", "IterationContext", "IterationResult", "PruningMethod"]

METHODS: Mapping[Method, PruningMethod] = {"laasp": laasp.iterate, "pls": pls.iterate}
