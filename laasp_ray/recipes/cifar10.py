"""LAASP on CIFAR-10: VGG16 and ResNets. The schedules come from the paper and from its authors' logs and script.

Where the logs and the script differ, a recipe follows the logs, and its variant `2023` follows the script.
"""

from __future__ import annotations

from dataclasses import replace

from laasp_ray.config import DataConfig, LaaspConfig, ModelConfig, RunConfig, SearchConfig, TrainConfig

CIFAR10_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR10_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def vgg16_cifar10() -> RunConfig:
    """VGG16 on CIFAR-10, 60.5% fewer FLOPs. A prune takes 10% of a layer's filters; a fine-tune of 3 epochs follows
    every 3% of FLOPs.
    """
    return _cifar10(
        "vgg16",
        LaaspConfig(flops_reduction=0.605, step=0.1, step_rule="layer_share", fine_tune_every=0.03, fine_tune_epochs=3),
        _cifar_schedule(epochs=160, prune_epoch=30, drop_epochs=(40, 80, 120)),
    )


def resnet20_cifar10() -> RunConfig:
    """ResNet-20 on CIFAR-10: 160 epochs, 50% fewer FLOPs (our choice: the paper has no row for it)."""
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
    """Pruning begins at epoch 60, and a fine-tune of one epoch follows every prune, as in the logs."""
    return _cifar10(
        f"resnet{depth}",
        LaaspConfig(flops_reduction=flops_reduction, fine_tune_every=0.0, fine_tune_epochs=1),
        _cifar_schedule(epochs=epochs, prune_epoch=60, drop_epochs=drop_epochs),
    )


def _cifar10(network: str, prune: LaaspConfig, train: TrainConfig) -> RunConfig:
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
    """A CIFAR ResNet's recipe as in the authors' script of 2023: learning rate x0.1, batch 128, 6 epochs of fine-tuning
    per 2% of FLOPs.
    """
    prune = config.prune
    assert isinstance(prune, LaaspConfig)  # all recipes with this variant have this section
    return replace(
        config,
        name=f"{config.name}-2023",
        prune=replace(prune, fine_tune_every=0.02, fine_tune_epochs=6),
        train=replace(
            config.train,
            epochs=200,
            prune_epoch=50,
            drop_epochs=(60, 120, 160, 190),
            drop_factor=0.1,
            batch_size=128,
        ),
    )


RECIPES = (vgg16_cifar10, resnet20_cifar10, resnet32_cifar10, resnet56_cifar10, resnet110_cifar10)
VARIANTS = {
    "2023": {
        recipe.__name__: _script_of_2023
        for recipe in (resnet20_cifar10, resnet32_cifar10, resnet56_cifar10, resnet110_cifar10)
    }
}
"""Variant -> the recipes that have it, each with the function that changes the recipe's config."""
