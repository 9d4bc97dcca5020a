"""How often a race chooses what the exhaustive search chooses, on real losses, and what it needs for that.

    python bench/races.py --data DATA [--only resnet20_epoch130 ...] [--races 200] [--matrices FOLDER] [--threads 2]

For each checkpoint of DATA the loss of every candidate on every one of 4,000 images of `cifar10_mini` is measured once
(and kept in FOLDER, or read from there), then raced for with as many seeds: agreement with the exhaustive choice, its
regret where it differs (the exhaustive loss of its choice less the least), the share of the evaluations, and the cost
in forward passes of the whole network, the one on all images without a prune included. The gap from the best to the
next is in standard errors of its mean over all images: what a sample of that many would have to tell apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from conformance import LOGGED
from machine import machine

from laasp_ray.config import ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.models import build, load_weights
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.recipes import recipe
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready
from laasp_ray.search.racing import Race

COLUMNS = ("checkpoint", "candidates", "gaps / s.e.", "agree", "worst regret", "evaluations", "most", "forwards", "all")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """`losses` (1 + candidates, images), the unpruned network first; costs in forward passes of the whole network."""

    losses: np.ndarray
    cost: np.ndarray
    ready: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of development data")
    parser.add_argument("--only", nargs="+", choices=LOGGED, default=list(LOGGED), help="these checkpoints only")
    parser.add_argument("--races", type=int, default=200, help="per checkpoint (default 200)")
    parser.add_argument("--matrices", type=Path, help="keep the losses there, and read them from there")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.only:
        kept = options.matrices / f"{name}.npz" if options.matrices else None
        matrix = read(kept) if kept is not None and kept.is_file() else measured(name, options.data)
        if kept is not None and not kept.is_file():
            np.savez(kept, **{field.name: getattr(matrix, field.name) for field in dataclasses.fields(matrix)})
        print(f"| {name} | " + " | ".join(races(matrix, options.races)) + " |", flush=True)
    return 0


def races(matrix: Matrix, count: int) -> list[str]:
    """The cells of a row."""
    base, losses = matrix.losses[0], matrix.losses[1:].astype(float)
    means = losses.mean(1)
    order = np.argsort(means, kind="stable")
    gaps = [
        (means[i] - means[order[0]]) / ((losses[i] - losses[order[0]]).std() / len(base) ** 0.5) for i in order[1:4]
    ]
    agreed, regrets, evaluations, forwards = 0, [], [], []
    for seed in range(count):
        race, seen, cost = Race(base, len(losses), seed=seed), 0, float(len(base))
        while requests := race.requests():
            for request in requests:
                some = list(request.candidates)
                seen += len(some) * len(request.images)
                cost += len(request.images) * (matrix.cost[1:][some].sum() + matrix.ready[1:][some].max())
                race.finish(request, losses[np.ix_(some, request.images)])
        assert race.choice is not None
        agreed += int(race.choice == order[0])
        regrets.append(means[race.choice] - means[order[0]])
        evaluations.append(seen / losses.size)
        forwards.append(cost / len(base))
    return [
        str(len(losses)),
        ", ".join(f"{gap:.1f}" for gap in gaps),
        f"{agreed} of {count}",
        f"{max(regrets):.6f}",
        f"{np.mean(evaluations):.1%}",
        f"{max(evaluations):.1%}",
        f"{np.mean(forwards):.2f}",
        f"{1 + matrix.cost[1:].sum():.2f}",
    ]


def measured(name: str, data: Path) -> Matrix:
    """Every candidate of a checkpoint on every image."""
    config = recipe("resnet20_cifar10")
    source = dataclasses.replace(config.data, path=str(data / "cifar10_mini"))
    calibration = draw_calibration_images(open_source(source, "train"), source, images=4000, seed=0)
    model = build(ModelConfig(builder=LOGGED[name].builder, input_shape=config.model.input_shape))
    load_weights(model, data / "checkpoints" / f"{name}.safetensors")
    example = torch.zeros(1, *config.model.input_shape)
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    proposals = propose(model, graph, macs, measure_baseline(graph, macs, config.prune), config.prune)
    images = CalibrationSet(calibration.images, calibration.labels, 250, lambda batch: normalise(batch, source))
    engine = Engine(ready(model, torch.device("cpu")), images)
    *candidates, unpruned = tasks_of(proposals)
    tasks = [unpruned, *candidates]
    costs = [engine.branch_points.cost(task) for task in tasks]
    return Matrix(
        engine.losses(tasks, np.arange(len(images))).values,
        np.array([cost.own / macs.total for cost in costs]),
        np.array([cost.shared / macs.total for cost in costs]),
    )


def read(path: Path) -> Matrix:
    with np.load(path) as arrays:
        return Matrix(arrays["losses"], arrays["cost"], arrays["ready"])


if __name__ == "__main__":
    sys.exit(main())
