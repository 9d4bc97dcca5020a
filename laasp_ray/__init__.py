"""laasp_ray: pruning of convolutional networks while they train, spread over a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laasp_ray.api import prune
    from laasp_ray.store.artifact import load_pruned

__all__ = ["load_pruned", "prune"]


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever only loads a pruned network needs neither Ray nor torch-pruning.
    if name == "prune":
        from laasp_ray.api import prune

        return prune
    if name == "load_pruned":
        from laasp_ray.store.artifact import load_pruned

        return load_pruned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
