"""The pruning methods. A method chooses what to prune next in the current network. Each is one object, made from a
run's config.
"""

from __future__ import annotations

from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.registry import method_of

__all__ = ["IterationContext", "IterationResult", "PruningMethod", "method_of"]
