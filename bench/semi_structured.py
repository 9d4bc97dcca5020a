"""Measures 2:4 sparse layers through torch's semi-structured kernels against the same layers dense, in float16.

    python bench/semi_structured.py [--batch 32] [--repeats 50] [--network torchvision.resnet50]

Needs an NVIDIA GPU of compute capability 8.0 or more. First single layers at sizes that networks have, then a whole
network pruned to 2:4, of which only linear layers and 1x1 convolutions run sparse. A ratio above 1 means that sparse is
faster; where it is slower, the table says so. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.benchmark import Timer

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.pruning.sparsity.groups import group_mask, sort_layers
from laasp_ray.pruning.sparsity.semi_structured import TWO_OF_FOUR, to_semi_structured

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # name: (layer, shape of one input)
    "linear 2048 -> 1024": (lambda: nn.Linear(2048, 1024), (2048,)),
    "linear 4096 -> 4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "linear 25088 -> 4096": (lambda: nn.Linear(25088, 4096), (25088,)),
    "1x1 256 -> 64, 56 x 56": (lambda: nn.Conv2d(256, 64, 1, bias=False), (256, 56, 56)),
    "1x1 1024 -> 256, 14 x 14": (lambda: nn.Conv2d(1024, 256, 1, bias=False), (1024, 14, 14)),
    "1x1 512 -> 2048, 7 x 7": (lambda: nn.Conv2d(512, 2048, 1, bias=False), (512, 7, 7)),
}


def prune(model: nn.Module) -> nn.Module:
    layers = sort_layers(model, TWO_OF_FOUR.group)
    for name in (*layers.convolutions, *layers.linear):
        weight = model.get_submodule(name).get_parameter("weight")
        weight.data.masked_fill_(~group_mask(weight, TWO_OF_FOUR), 0)
    return model


def milliseconds(model: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """The mean over `repeats`, after as many again to warm up; torch's timer waits for the GPU."""
    with torch.inference_mode():
        timer = Timer("model(images)", globals={"model": model, "images": images})
        timer.timeit(repeats)
        return timer.timeit(repeats).mean * 1000


def compare(name: str, model: nn.Module, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, float]:
    """Prints one row, and returns its figures."""
    model = prune(model).cuda().half().eval()
    images = torch.randn(options.batch, *shape, device="cuda", dtype=torch.float16)
    if images.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted = model(images)
    dense = milliseconds(model, images, options.repeats)
    conversion = to_semi_structured(model)
    with torch.inference_mode():
        error = (model(images) - wanted).abs().max() / wanted.abs().max()
    sparse = milliseconds(model, images, options.repeats)
    verdict = "faster" if sparse < dense else "slower"
    print(
        f"{name:<28} {len(conversion.converted):>4} sparse  dense {dense:8.3f} ms  sparse {sparse:8.3f} ms  "
        f"{dense / sparse:5.2f}x {verdict}  error {float(error):.1e}"
    )
    return {
        "sparse layers": len(conversion.converted),
        "dense ms": dense,
        "sparse ms": sparse,
        "speed-up": dense / sparse,
        "error": float(error),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--network", default="torchvision.resnet50")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU here; the semi-structured kernels need one", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16, batch {options.batch}")
    torch.manual_seed(0)
    for name, (make, shape) in LAYERS.items():
        # In a Sequential, since a layer is exchanged by its name in the network around it.
        compare(name, nn.Sequential(make()), shape, options)
    config = ModelConfig(builder=options.network)
    compare(options.network, models.build(config), config.input_shape, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
