"""LAASP on ImageNet: ResNets and MobileNetV2, with the schedules of the LAASP paper (Ghimire, Lee, Kim 2023)."""

from __future__ import annotations

from dataclasses import replace

from laasp_ray.config import DataConfig, LaaspConfig, ModelConfig, RunConfig, SearchConfig, TrainConfig


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

    The paper gives results but no schedule, so the schedule is our choice. Weight decay is 4e-5. The learning rate
    falls every epoch, as usual for this network: by 0.96 from 0.05, to 1e-4 in 150 epochs of batch 256. Pruning begins
    at epoch 37, a quarter of the schedule. A fine-tune of 2 epochs follows every 3% of FLOPs; both are as for the
    ResNets.
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
    """100 epochs, learning rate x0.1 every 30, pruning at epoch 25, a fine-tune of 2 epochs per 3% of FLOPs."""
    return RunConfig(
        name=f"{network}_imagenet",
        model=ModelConfig(builder=f"torchvision.{network}", arguments={"num_classes": 1000}, input_shape=(3, 224, 224)),
        data=DataConfig(path="imagenet", threads=8),
        prune=LaaspConfig(flops_reduction=flops_reduction, fine_tune_every=0.03, fine_tune_epochs=2),
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


RECIPES = (resnet18_imagenet, resnet34_imagenet, resnet50_imagenet, mobilenet_v2_imagenet)
