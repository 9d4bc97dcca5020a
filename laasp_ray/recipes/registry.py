"""Recipes by name: each is a function that gives a whole config.

Sources of the figures: the LAASP paper (Ghimire, Lee, Kim 2023), its code and the logs published with it; for what they
leave open, the choice is named at the recipe. Targets are the stronger of the paper's: --flops-reduction reaches its
other rows.

Every recipe trains from scratch. With --pretrained it begins with pruning: --prune-epoch says at which epoch of the
schedule the weights stand, and so the learning rate of fine-tuning and of what follows. For a network trained to its
end an epoch late in the schedule tunes it finely; an early one trains it again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from laasp_ray.config import RunConfig, SparsityConfig
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import cifar10, digits, group_sparsity, imagenet

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for room in (cifar10, imagenet, digits, group_sparsity) for recipe in room.RECIPES
}
VARIANTS: dict[str, dict[str, Callable[[RunConfig], RunConfig]]] = {**cifar10.VARIANTS}


def with_sparsity(config: RunConfig) -> RunConfig:
    """`config` as a run of group sparsity, on its own schedule, under a name of its own; one that is stays as it is."""
    if config.sparsity is not None:
        return config
    prune = replace(config.prune, flops_reduction=0.0)
    return replace(config, name=f"{config.name}_sparse", prune=prune, sparsity=SparsityConfig())


def recipe(name: str, variant: str | None = None) -> RunConfig:
    """A recipe's config, or that of a variant of it, under a name of its own.

    Raises ConfigError, with the known names, for an unknown one, and for a variant that the recipe does not have.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown recipe {name!r}: {hint}known recipes: {', '.join(sorted(RECIPES))}")
    config = RECIPES[name]()
    if variant is None:
        return config
    of_this = [known for known, recipes in VARIANTS.items() if name in recipes]
    if variant not in of_this:
        has = f"its variants: {', '.join(of_this)}" if of_this else "it has none"
        raise ConfigError(f"the recipe {name} has no variant {variant!r}; {has}")
    return VARIANTS[variant][name](config)
