"""A trained network and few epochs: pruned with compensation (methods.md), then fine-tuned. All figures are our choice.

The network's own weights are given. It is pruned at once, with an epoch of fine-tuning whenever 5% of FLOPs are gone,
and trained for ten epochs at the end: 20 epochs for half of the FLOPs. After the first prune the network also learns
the outputs that it had before (distillation), the only option beyond the paper that was clearly better (results.md).
"""

from __future__ import annotations

from dataclasses import replace

from laasp_ray.config import LaaspConfig, RunConfig
from laasp_ray.recipes.cifar10 import resnet56_cifar10
from laasp_ray.recipes.imagenet import mobilenet_v2_imagenet, resnet50_imagenet
from laasp_ray.recipes.variants import compensated


def resnet50_imagenet_finetune() -> RunConfig:
    """torchvision's ResNet-50, 50% fewer FLOPs."""
    return _finetune(resnet50_imagenet(), "torchvision:IMAGENET1K_V2", learning_rate=0.01)


def mobilenet_v2_imagenet_finetune() -> RunConfig:
    """torchvision's MobileNetV2, 30% fewer FLOPs."""
    config = _finetune(mobilenet_v2_imagenet(), "torchvision:IMAGENET1K_V2", learning_rate=0.01)
    return replace(config, prune=replace(config.prune, flops_reduction=0.3))  # type: ignore[call-arg]


def resnet56_cifar10_finetune() -> RunConfig:
    """ResNet-56 on CIFAR-10, 50% fewer FLOPs. The weights are yours: --pretrained."""
    return _finetune(resnet56_cifar10(), "resnet56_cifar10.safetensors", learning_rate=0.01)


def _finetune(config: RunConfig, pretrained: str, *, learning_rate: float) -> RunConfig:
    prune = compensated(LaaspConfig(flops_reduction=0.5, step=0.02, fine_tune_every=0.05, fine_tune_epochs=1))
    train = replace(
        config.train,
        epochs=10,
        prune_epoch=0,
        learning_rate=learning_rate,
        drop_epochs=(),
        schedule="cosine",
        pretrained=pretrained,
        distill=0.5,
    )
    return replace(config, name=f"{config.name}_finetune", prune=prune, train=train)


RECIPES = (resnet50_imagenet_finetune, mobilenet_v2_imagenet_finetune, resnet56_cifar10_finetune)
