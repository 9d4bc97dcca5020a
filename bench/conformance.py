"""Compares the first prune that the search chooses with what the logs of LAASP's authors say, for four checkpoints.

    python bench/conformance.py --data DATA [--only resnet20_epoch100 ...] [--images 4000] [--seed 0] [--threads 2]

DATA is the folder of development data: `checkpoints/*.safetensors` and `cifar10_mini`. The losses are measured on
`--images` of its training images under the training augmentation, drawn once by `--seed`; the authors drew 10,000 of
50,000. The FLOPs reduction does not depend on the images: where it is not the logged one, the script ends with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine

from laasp_ray.config import ModelConfig
from laasp_ray.data.calibration import CalibrationImages, draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.models import build, load_weights
from laasp_ray.recipes import recipe
from laasp_ray.search import rank


@dataclass(frozen=True)
class Logged:
    """The first prune in the authors' log; `flops_reduction` as it is printed there, as a share."""

    builder: str
    layer: str
    criterion: str
    filters: int
    flops_reduction: str


LOGGED = {
    "resnet20_epoch100": Logged("cifar.resnet20", "layer1.0.conv1", "l1", 1, "0.007226"),
    "resnet20_epoch130": Logged("cifar.resnet20", "layer1.1.conv1", "l1", 1, "0.007226"),
    "resnet32_epoch50": Logged("cifar.resnet32", "layer2.0.downsample.0", "l1", 1, "0.010251"),
    "resnet56_epoch60": Logged("cifar.resnet56", "layer2.7.conv2", "l1", 1, "0.010326"),
}
COLUMNS = (
    "checkpoint",
    "logged choice",
    "FLOPs log",
    "ours",
    "rank",
    "our choice",
    "candidates",
    "loss",
    "logged - best",
    "seconds",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of development data")
    parser.add_argument("--only", nargs="+", choices=LOGGED, default=list(LOGGED), help="these checkpoints only")
    parser.add_argument(
        "--images", type=int, default=4000, help="training images in the calibration set (default 4000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws images and augmentation (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("torch-pruning", "fvcore"))
    data = dataclasses.replace(recipe("resnet20_cifar10").data, path=str(options.data / "cifar10_mini"))
    calibration = draw_calibration_images(open_source(data, "train"), data, images=options.images, seed=options.seed)
    print(f"{len(calibration.labels)} images of cifar10_mini, seed {options.seed}, digest {calibration.digest[:12]}")
    print(" | ".join(COLUMNS), flush=True)
    met = True
    for name in options.only:
        reduction, cells = compare(name, options.data / "checkpoints" / f"{name}.safetensors", calibration)
        met &= reduction == LOGGED[name].flops_reduction
        print(" | ".join(cells), flush=True)
    print(f"FLOPs reductions met to the last printed digit: {'all' if met else 'NOT ALL'}")
    return 0 if met else 1


def compare(name: str, weights: Path, calibration: CalibrationImages) -> tuple[str, tuple[str, ...]]:
    """The FLOPs reduction after the logged prune, printed as the log does, and the row of the table."""
    logged = LOGGED[name]
    config = recipe("resnet20_cifar10")
    model = build(ModelConfig(builder=logged.builder, input_shape=config.model.input_shape))
    load_weights(model, weights)
    started = time.perf_counter()
    ranking = rank(
        model,
        calibration.images,
        calibration.labels,
        criteria=config.prune.criteria,
        step=config.prune.step,
        max_pruned=config.prune.max_pruned,
        batch_size=config.search.batch_size,
        prepare=lambda batch: normalise(batch, config.data),
        compensate="off",  # as the authors' search
    )
    seconds = time.perf_counter() - started
    place, best = ranking.rank_of(logged.layer, logged.criterion), ranking[0]
    theirs = ranking[place - 1]
    if len(theirs.filters) != logged.filters:
        raise SystemExit(f"{name}: {theirs.candidate.name}, the log removes {logged.filters}")
    reduction = f"{theirs.flops_reduction:.6f}"
    cells = (
        name,
        f"{logged.layer} {logged.criterion} x{logged.filters}",
        logged.flops_reduction,
        reduction,
        str(place),
        f"{best.layer} {best.criterion} x{len(best.filters)}",
        str(len(ranking)),
        f"{best.loss:.6f}",
        f"{theirs.loss - best.loss:.6f}",
        f"{seconds:.0f}",
    )
    return reduction, cells


if __name__ == "__main__":
    sys.exit(main())
