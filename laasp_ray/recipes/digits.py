"""The quickstart: ImageNet's network and code path, small enough for a laptop."""

from __future__ import annotations

from laasp_ray.config import DataConfig, ExportConfig, LaaspConfig, ModelConfig, RunConfig, SearchConfig, TrainConfig


def resnet50_digits() -> RunConfig:
    """The same network and code path as on ImageNet, on the embedded handwritten digits, sized for two CPU cores.

    The schedule is our own. Digits are not flipped, since a mirrored 2 is not a 2.
    """
    size = 16
    return RunConfig(
        name="resnet50_digits",
        model=ModelConfig(
            builder="torchvision.resnet50",
            # With residual branches that start at zero, a network this deep learns from few images.
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
        prune=LaaspConfig(flops_reduction=0.25, step=0.05, fine_tune_every=0.05, fine_tune_epochs=1),
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
        # To compile both networks for both batches takes 130 s of CPU time; jobs/evaluate.py does it.
        export=ExportConfig(latency=("eager", "onnxruntime")),
    )


RECIPES = (resnet50_digits,)
