"""Recipes by name. A recipe is a function that returns a whole config.

Sources of the figures: the LAASP paper (Ghimire, Lee, Kim 2023), its code and its published logs. A recipe's docstring
says which figures are our choice. The targets are the paper's strongest; --flops-reduction sets its other rows.

A recipe trains from scratch, but for those of finetune.py, which begin with given weights. With --pretrained any recipe
begins with pruning. --prune-epoch then says which epoch of the schedule the weights belong to, and so sets the learning
rate of the fine-tunes and of the final training. If the given network is fully trained, a late epoch means fine-tuning
it and an early epoch means training it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from laasp_ray.config import GroupSparsityConfig, LaaspConfig, RunConfig
from laasp_ray.config.names import did_you_mean, imported, is_import_path
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import cifar10, digits, finetune, group_sparsity, imagenet
from laasp_ray.recipes.variants import OF_LAASP, compensated, with_laasp

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for room in (cifar10, imagenet, digits, finetune, group_sparsity) for recipe in room.RECIPES
}
VARIANTS: dict[str, dict[str, Callable[[RunConfig], RunConfig]]] = {**cifar10.VARIANTS}
VARIANT_NAMES = (*OF_LAASP, *VARIANTS)
"""All variants; not every recipe has every one."""


def with_sparsity(config: RunConfig) -> RunConfig:
    """`config` as a run of group sparsity, with another name and the same schedule. A run of group sparsity is
    unchanged.
    """
    if isinstance(config.prune, GroupSparsityConfig):
        return config
    kept = GroupSparsityConfig(ignored=config.prune.ignored, fine_tune_epochs=config.prune.fine_tune_epochs)
    return replace(config, name=f"{config.name}_sparse", prune=kept)


def recipe(name: str, variant: str | None = None) -> RunConfig:
    """The config of a recipe, or of a variant of it under its own name.

    `name` may be the import path `package.module:function` of a function that takes no arguments and returns a
    RunConfig. Raises ConfigError, with the known names, for an unknown recipe and for a variant that the recipe does
    not have.
    """
    config = _imported(name) if is_import_path(name) else _known(name)
    if variant is None:
        return config
    return with_variant(config, name, variant)


def with_variant(config: RunConfig, name: str, variant: str) -> RunConfig:
    """The variant of `config`, the recipe called `name`. Raises ConfigError if it has no such variant."""
    prune = config.prune
    if isinstance(prune, LaaspConfig) and variant in OF_LAASP:
        return with_laasp(config, prune, variant)
    of_this = [known for known, recipes in VARIANTS.items() if name in recipes]
    if variant not in of_this:
        of_this += OF_LAASP if isinstance(prune, LaaspConfig) else []
        has = f"its variants: {', '.join(of_this)}" if of_this else "it has none"
        raise ConfigError(f"the recipe {name} has no variant {variant!r}; {has}")
    return VARIANTS[variant][name](config)


def for_trained_network(config: RunConfig) -> RunConfig:
    """`config` with compensation, for a run that begins with trained weights. Other methods' runs are unchanged."""
    prune = config.prune
    return replace(config, prune=compensated(prune)) if isinstance(prune, LaaspConfig) else config


def _known(name: str) -> RunConfig:
    if name not in RECIPES:
        hint = f"{did_you_mean(name, RECIPES)} known recipes: {', '.join(sorted(RECIPES))}".lstrip()
        raise ConfigError(f"unknown recipe {name!r}: {hint}, or an import path package.module:function")
    return RECIPES[name]()


def _imported(path: str) -> RunConfig:
    make = imported(path, "the recipe")
    try:
        config = make()
    except ConfigError:
        raise
    except Exception as error:  # a user's function can raise any error
        raise ConfigError(f"the recipe {path!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"the recipe {path!r} gave a {type(config).__name__}, must give a RunConfig")
    return config
