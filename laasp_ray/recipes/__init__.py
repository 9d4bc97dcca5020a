"""Named runs: `recipe(name)` returns the whole config of one."""

from __future__ import annotations

from laasp_ray.recipes.registry import (
    RECIPES,
    VARIANT_NAMES,
    VARIANTS,
    for_trained_network,
    recipe,
    with_sparsity,
    with_variant,
)

__all__ = ["RECIPES", "VARIANT_NAMES", "VARIANTS", "for_trained_network", "recipe", "with_sparsity", "with_variant"]
