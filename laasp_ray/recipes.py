"""Named runs: each function gives the whole config.

Sources of the figures: the LAASP paper (Ghimire, Lee, Kim 2023), its code and the logs published with it; for what they
leave open, the choice is named here. Where logs and code differ, a recipe follows the logs and a variant (VARIANTS) the
code. Targets are the stronger of the paper's: --flops-reduction reaches its other rows.

Every recipe trains from scratch. With --pretrained it begins with pruning: --prune-epoch says at which epoch of the
schedule the weights stand, and so the learning rate of recoveries and of what follows. For a network trained to its end
an epoch late in the schedule tunes it finely; an early one trains it again.
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


def resnet18_imagenet() -> RunConfig:
    """ResNet-18 on ImageNet, 45.4% fewer FLOPs."""
    return _imagenet("resnet18", 0.454)


def resnet34_imagenet() -> RunConfig:
    """ResNet-34 on ImageNet, 45.4% fewer FLOPs."""
    return _imagenet("resnet34", 0.454)


def resnet50_imagenet() -> RunConfig:
    """ResNet-50 on ImageNet, 53.8% fewer FLOPs."""
    return _imagenet("resnet50", 0.538)


def mobilenet_v2_imagenet() -> RunConfig:
    """MobileNetV2 on ImageNet, 54.5% fewer FLOPs.

    The paper gives results but no schedule; all of this is our choice: weight decay 4e-5 and a learning rate that falls
    every epoch, as usual for this network, here by 0.96 from 0.05, to 1e-4 in 150 epochs of batch 256; pruning at
    epoch 37, a quarter of the schedule, and recoveries of 2 epochs per 3%, both as for the ResNets.
    """
    epochs = 150
    schedule = TrainConfig(
        epochs=epochs,
        prune_epoch=37,
        learning_rate=0.05,
        drop_epochs=tuple(range(1, epochs)),
        drop_factor=0.96,
        batch_size=256,
        weight_decay=4e-5,
    )
    return replace(_imagenet("mobilenet_v2", 0.545), train=schedule)


def _imagenet(network: str, flops_reduction: float) -> RunConfig:
    """100 epochs, x0.1 every 30, pruning at epoch 25, recoveries of 2 epochs per 3%."""
    return RunConfig(
        name=f"{network}_imagenet",
        model=ModelConfig(builder=f"torchvision.{network}", arguments={"num_classes": 1000}, input_shape=(3, 224, 224)),
        data=DataConfig(path="imagenet", threads=8),
        prune=PruneConfig(flops_reduction=flops_reduction, recover_every=0.03, recover_epochs=2),
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


def vgg16_cifar10() -> RunConfig:
    """VGG16 on CIFAR-10, 60.5% fewer FLOPs: a prune takes 10% of a layer's filters, recoveries of 3 epochs per 3%."""
    return _cifar10(
        "vgg16",
        PruneConfig(flops_reduction=0.605, step=0.1, step_rule="layer_share", recover_every=0.03, recover_epochs=3),
        _cifar_schedule(epochs=160, prune_epoch=30, drop_epochs=(40, 80, 120)),
    )


def resnet20_cifar10() -> RunConfig:
    """ResNet-20 on CIFAR-10: 160 epochs, half of the FLOPs (our choice: the paper has no row for it)."""
    return _cifar10_resnet(20, 0.5, epochs=160, drop_epochs=(40, 80, 120))


def resnet32_cifar10() -> RunConfig:
    """ResNet-32 on CIFAR-10: 200 epochs, 53.3% fewer FLOPs."""
    return _cifar10_resnet(32, 0.533)


def resnet56_cifar10() -> RunConfig:
    """ResNet-56 on CIFAR-10: 200 epochs, 52.6% fewer FLOPs."""
    return _cifar10_resnet(56, 0.526)


def resnet110_cifar10() -> RunConfig:
    """ResNet-110 on CIFAR-10: 200 epochs, 58.5% fewer FLOPs."""
    return _cifar10_resnet(110, 0.585)


def _cifar10_resnet(
    depth: int, flops_reduction: float, *, epochs: int = 200, drop_epochs: tuple[int, ...] = (60, 120, 160, 190)
) -> RunConfig:
    """Pruning at epoch 60, a recovery of one epoch after every prune, as the logs have it."""
    return _cifar10(
        f"resnet{depth}",
        PruneConfig(flops_reduction=flops_reduction, recover_every=0.0, recover_epochs=1),
        _cifar_schedule(epochs=epochs, prune_epoch=60, drop_epochs=drop_epochs),
    )


def _cifar10(network: str, prune: PruneConfig, train: TrainConfig) -> RunConfig:
    return RunConfig(
        name=f"{network}_cifar10",
        model=ModelConfig(builder=f"cifar.{network}", arguments={"num_classes": 10}, input_shape=(3, 32, 32)),
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
        prune=prune,
        search=SearchConfig(images=10_000, batch_size=250),
        train=train,
    )


def _cifar_schedule(*, epochs: int, prune_epoch: int, drop_epochs: tuple[int, ...]) -> TrainConfig:
    return TrainConfig(
        epochs=epochs,
        prune_epoch=prune_epoch,
        learning_rate=0.1,
        drop_epochs=drop_epochs,
        drop_factor=0.2,
        batch_size=256,
        weight_decay=5e-4,
    )


def _script_of_2023(config: RunConfig) -> RunConfig:
    """A CIFAR ResNet's recipe as the authors' script of 2023 has it: x0.1, batch 128, recoveries of 6 epochs per 2%."""
    return replace(
        config,
        name=f"{config.name}-2023",
        prune=replace(config.prune, recover_every=0.02, recover_epochs=6),
        train=replace(
            config.train,
            epochs=200,
            prune_epoch=50,
            drop_epochs=(60, 120, 160, 190),
            drop_factor=0.1,
            batch_size=128,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        vgg16_cifar10,
        resnet20_cifar10,
        resnet32_cifar10,
        resnet56_cifar10,
        resnet110_cifar10,
        resnet18_imagenet,
        resnet34_imagenet,
        resnet50_imagenet,
        mobilenet_v2_imagenet,
        resnet50_digits,
    )
} | AAP_RECIPES


def with_sparsity(config: RunConfig) -> RunConfig:
    """`config` as a run of group sparsity, on its own schedule, under a name of its own; one that is stays as it is."""
    if config.sparsity is not None:
        return config
    prune = replace(config.prune, flops_reduction=0.0)
    return replace(config, name=f"{config.name}_sparse", prune=prune, sparsity=SparsityConfig())


VARIANTS: dict[str, dict[str, Callable[[RunConfig], RunConfig]]] = {
    "2023": {
        recipe.__name__: _script_of_2023
        for recipe in (resnet20_cifar10, resnet32_cifar10, resnet56_cifar10, resnet110_cifar10)
    }
}
"""Variant -> the recipes that have it, each with what makes it of the recipe's config."""


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
