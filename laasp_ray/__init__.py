"""laasp_ray: pruning of convolutional networks while they train, spread over a Ray cluster.

`__all__` names the whole public API. Each name is imported on first use, so a program that only loads a pruned network
needs neither Ray nor torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laasp_ray.api import prune
    from laasp_ray.config import RunConfig
    from laasp_ray.errors import (
        ArtifactError,
        ConfigError,
        DataError,
        ExhaustedError,
        ExportError,
        LaaspError,
        MemoryShortError,
        PruningError,
        SearchError,
        StoreError,
        TrainingError,
        UnmaskedError,
    )
    from laasp_ray.recipes import recipe
    from laasp_ray.search import rank
    from laasp_ray.store.artifact import load_pruned

    __version__: str

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "ExhaustedError",
    "ExportError",
    "LaaspError",
    "MemoryShortError",
    "PruningError",
    "RunConfig",
    "SearchError",
    "StoreError",
    "TrainingError",
    "UnmaskedError",
    "__version__",
    "load_pruned",
    "prune",
    "rank",
    "recipe",
]
_HOMES = {
    "RunConfig": "config",
    "load_pruned": "store.artifact",
    "prune": "api",
    "rank": "search.ranking",
    "recipe": "recipes.registry",
}
"""Public name -> the module that defines it. Names that end in Error are not listed; they come from `errors`."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version of the installed package, from pyproject.toml. A submitted job may run from a copy that is not
    installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("laasp_ray")
    except PackageNotFoundError:
        return "unknown"
