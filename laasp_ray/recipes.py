"""Named runs: each function gives the whole config.

Sources of the figures: the LAASP paper (Ghimire, Lee, Kim 2023), its code and the logs published with it; for what they
leave open, the choice is named here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from laasp_ray.config import DataConfig, ModelConfig, PruneConfig, RunConfig, SearchConfig, SparsityConfig, TrainConfig
from laasp_ray.errors import ConfigError
from laasp_ray.recipes_aap import AAP_RECIPES

CIFAR10_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR10_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def resnet50_imagenet() -> RunConfig:
    """ResNet-50 on ImageNet at the paper's stronger setting, 53.8% fewer FLOPs; recoveries of 2 epochs per 3%."""
    return RunConfig(
        name="resnet50_imagenet",
        model=ModelConfig(builder="torchvision.resnet50", arguments={"num_classes": 1000}, input_shape=(3, 224, 224)),
        data=DataConfig(format="folder", path="imagenet", threads=8),
        prune=PruneConfig(flops_reduction=0.538, recover_every=0.03, recover_epochs=2),
        search=SearchConfig(images=5000, batch_size=250),
        train=TrainConfig(
            epochs=100,
            prune_epoch=25,
            learning_rate=0.1,
            drop_epochs=(30, 60, 90),
            drop_factor=0.1,
            batch_size=256,
            weight_decay=1e-4,
        ),
    )


def resnet50_digits() -> RunConfig:
    """The same network and path at a size for two CPU cores, on the handwritten digits that scikit-learn carries.

    Our own schedule; digits are not mirrored, since a mirrored 2 is not a 2.
    """
    size = 16
    return RunConfig(
        name="resnet50_digits",
        model=ModelConfig(
            builder="torchvision.resnet50",
            # Residual branches that begin as nothing let a network this deep learn from so few images at once.
            arguments={"num_classes": 10, "zero_init_residual": True},
            input_shape=(3, size, size),
        ),
        data=DataConfig(
            format="digits",
            image_size=size,
            eval_resize=size,
            scale=(0.8, 1.0),
            ratio=(0.9, 1.1),
            flip=0.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            threads=1,
        ),
        prune=PruneConfig(flops_reduction=0.25, step=0.05, recover_every=0.05, recover_epochs=1),
        search=SearchConfig(images=100, batch_size=100),
        train=TrainConfig(
            epochs=10,
            prune_epoch=8,
            learning_rate=0.05,
            drop_epochs=(6, 9),
            drop_factor=0.2,
            batch_size=128,
            weight_decay=5e-4,
        ),
    )


def resnet20_cifar10() -> RunConfig:
    """ResNet-20 on CIFAR-10: 160 epochs, prune at 60, recovery of one epoch after every prune, as the logs have it."""
    return _cifar10_resnet(20, epochs=160, drop_epochs=(40, 80, 120))


def resnet56_cifar10() -> RunConfig:
    """ResNet-56 on CIFAR-10: 200 epochs, prune at 60, recovery of one epoch after every prune, as the logs have it."""
    return _cifar10_resnet(56, epochs=200, drop_epochs=(60, 120, 160, 190))


def _cifar10_resnet(depth: int, *, epochs: int, drop_epochs: tuple[int, ...]) -> RunConfig:
    return RunConfig(
        name=f"resnet{depth}_cifar10",
        model=ModelConfig(builder=f"cifar.resnet{depth}", arguments={"num_classes": 10}, input_shape=(3, 32, 32)),
        data=DataConfig(
            path="cifar10",
            train_transform="pad_crop",
            image_size=32,
            eval_resize=0,
            pad=4,
            flip=0.5,
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
        ),
        prune=PruneConfig(flops_reduction=0.5, recover_every=0.0, recover_epochs=1),
        search=SearchConfig(images=10_000, batch_size=250),
        train=TrainConfig(
            epochs=epochs,
            prune_epoch=60,
            learning_rate=0.1,
            drop_epochs=drop_epochs,
            drop_factor=0.2,
            batch_size=256,
            weight_decay=5e-4,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (resnet50_imagenet, resnet50_digits, resnet20_cifar10, resnet56_cifar10)
} | AAP_RECIPES


def with_sparsity(config: RunConfig) -> RunConfig:
    """`config` as a run of group sparsity, on its own schedule, under a name of its own; one that is stays as it is."""
    if config.sparsity is not None:
        return config
    prune = replace(config.prune, flops_reduction=0.0)
    return replace(config, name=f"{config.name}_sparse", prune=prune, sparsity=SparsityConfig())


def recipe(name: str) -> RunConfig:
    """Raises ConfigError, with the known names, for an unknown one."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown recipe {name!r}: {hint}known recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
