"""Methods by name or import path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laasp_ray.config import RunConfig
from laasp_ray.config.names import imported, is_import_path
from laasp_ray.errors import ConfigError
from laasp_ray.methods.base import PruningMethod
from laasp_ray.methods.group_sparsity import GroupSparsity
from laasp_ray.methods.laasp import Laasp
from laasp_ray.methods.pls import PlsPruning

BUILT_IN: Mapping[str, type[PruningMethod[Any]]] = {
    method.config_class.method: method for method in (Laasp, PlsPruning, GroupSparsity)
}
"""Name of a method in `prune.method` (config/methods.py) -> its class."""


def method_of(config: RunConfig) -> PruningMethod[Any]:
    """The method of a run. Raises ConfigError for an import path that does not name a subclass of PruningMethod."""
    name = config.prune.method
    if not is_import_path(name):
        return BUILT_IN[name]()
    found = imported(name, "prune.method", of_any_kind=True)
    if not (isinstance(found, type) and issubclass(found, PruningMethod)):
        raise ConfigError(f"prune.method {name!r} must be a subclass of laasp_ray.methods.PruningMethod")
    try:
        method = found()
    except Exception as error:  # a user's class can raise any error
        raise ConfigError(f"prune.method {name!r} cannot be made: {type(error).__name__}: {error}") from error
    check_section(config, method)
    return method


def check_section(config: RunConfig, method: PruningMethod[Any]) -> None:
    """Raises ConfigError unless the run's section `prune` is an instance of the method's `config_class`."""
    if not isinstance(config.prune, method.config_class):
        raise ConfigError(
            f"the method {type(method).__name__} takes a section prune of class {method.config_class.__name__}, this "
            f"run's is a {type(config.prune).__name__}: give it its own"
        )
