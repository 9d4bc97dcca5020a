"""Methods by name or import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from laasp_ray.config import RunConfig
from laasp_ray.config.names import imported, is_import_path
from laasp_ray.errors import ConfigError
from laasp_ray.methods.base import PruningMethod
from laasp_ray.methods.group_sparsity import GroupSparsity
from laasp_ray.methods.laasp import Laasp
from laasp_ray.methods.pls import PlsPruning

BUILT_IN: Mapping[str, Callable[[], PruningMethod]] = {"laasp": Laasp, "pls": PlsPruning}
"""Name, as `prune.method` has it (config.METHODS) -> class."""


def method_of(config: RunConfig) -> PruningMethod:
    """The method of a run. Raises ConfigError for an import path that names no class of a PruningMethod."""
    if config.sparsity is not None:
        return GroupSparsity(config.sparsity, config.prune.ignored, config.seed)
    name = config.prune.method
    if not is_import_path(name):
        return BUILT_IN[name]()
    found = imported(name, "prune.method", of_any_kind=True)
    if not (isinstance(found, type) and issubclass(found, PruningMethod)):
        raise ConfigError(f"prune.method {name!r} must be a subclass of laasp_ray.methods.PruningMethod")
    try:
        return found()
    except Exception as error:  # a user's class can fail in any way
        raise ConfigError(f"prune.method {name!r} cannot be made: {type(error).__name__}: {error}") from error
