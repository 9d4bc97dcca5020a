"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from laasp_ray.config import RunConfig
from laasp_ray.methods.base import PruningMethod
from laasp_ray.methods.group_sparsity import GroupSparsity
from laasp_ray.methods.laasp import Laasp
from laasp_ray.methods.pls import Pls

METHODS: Mapping[str, Callable[[], PruningMethod]] = {"laasp": Laasp, "pls": Pls}
"""What `prune.method` may be -> its class."""


def method_of(config: RunConfig) -> PruningMethod:
    """The method of a run."""
    if config.sparsity is not None:
        return GroupSparsity(config.sparsity, config.prune.ignored, config.seed)
    return METHODS[config.prune.method]()
