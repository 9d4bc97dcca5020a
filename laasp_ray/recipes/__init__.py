"""Named runs: `recipe(name)` returns the whole config of one."""

from __future__ import annotations

from laasp_ray.recipes.registry import RECIPES, VARIANTS, recipe, with_sparsity

__all__ = ["RECIPES", "VARIANTS", "recipe", "with_sparsity"]
