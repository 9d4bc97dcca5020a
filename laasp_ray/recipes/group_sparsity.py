"""Recipes of group sparsity (methods/group_sparsity.py) on ImageNet. Flags set the other rows of Kang's table.

The paper's schedules are not public, so all figures here are our choice. The network is trained for 90 epochs with its
authors' settings, or is given (--pretrained, --from-run). The sparse network is then trained for 30 epochs, at the last
learning rate of the 90; from the twentieth epoch on the rate is a tenth of it. MobileNet v1 is trained the same way,
instead of by RMSprop.
"""

from __future__ import annotations

from typing import Any

from laasp_ray.config import DataConfig, GroupSparsityConfig, ModelConfig, RunConfig, TrainConfig


def alexnet_grouped_aap() -> RunConfig:
    """The original AlexNet with grouped convolutions, without LRN, as in the paper."""
    return _imagenet("alexnet_grouped", "zoo.alexnet_grouped", learning_rate=0.01, weight_decay=5e-4)


def alexnet_aap() -> RunConfig:
    """torchvision's AlexNet."""
    return _imagenet("alexnet", "torchvision.alexnet", learning_rate=0.01)


def vgg16_aap() -> RunConfig:
    return _imagenet("vgg16", "torchvision.vgg16", learning_rate=0.01)


def resnet50_aap() -> RunConfig:
    return _imagenet("resnet50", "torchvision.resnet50", learning_rate=0.1)


def resnet152_aap() -> RunConfig:
    return _imagenet("resnet152", "torchvision.resnet152", learning_rate=0.1)


def squeezenet1_0_aap() -> RunConfig:
    return _imagenet("squeezenet1_0", "torchvision.squeezenet1_0", learning_rate=0.01, weight_decay=2e-4)


def mobilenet_v1_aap() -> RunConfig:
    return _imagenet("mobilenet_v1", "zoo.mobilenet_v1", learning_rate=0.1, weight_decay=4e-5)


def _imagenet(name: str, builder: str, **train: Any) -> RunConfig:
    return RunConfig(
        name=f"{name}_aap",
        model=ModelConfig(builder=builder, arguments={"num_classes": 1000}, input_shape=(3, 224, 224)),
        data=DataConfig(path="imagenet", threads=8),
        prune=GroupSparsityConfig(group=16, pruned_per_group=12, fine_tune_epochs=5),
        train=TrainConfig(epochs=120, prune_epoch=90, drop_epochs=(30, 60, 110), drop_factor=0.1, **train),
    )


RECIPES = (
    alexnet_grouped_aap,
    alexnet_aap,
    vgg16_aap,
    resnet50_aap,
    resnet152_aap,
    squeezenet1_0_aap,
    mobilenet_v1_aap,
)
