"""How often a race chooses what the exhaustive search chooses, on real losses, and what it needs for that.

    python bench/races.py --data DATA [--only resnet20_epoch130 ...] [--races 200] [--matrices FOLDER] [--threads 2]
                          [--growth 1.6] [--plain | --compensated] [--hard]

For each checkpoint of DATA the loss of every candidate on every one of 4,000 images of `cifar10_mini` is measured once,
in float32 and in bfloat16 (and kept in FOLDER, or read from there): the paper's four criteria, and those with obs, made
up for. Then it is raced for with as many seeds, in float32 alone and in two precisions: agreement with the exhaustive
choice in float32, its regret where it differs (the exhaustive loss of its choice less the least), the share of the
evaluations, and the cost in forward passes of the whole network in float32 and in bfloat16, the one on all images
without a prune included. `steps` are rounds and others, which wait for each other. The gap from the best to the next is
in standard errors of its mean over all images: what a sample of that many would have to tell apart.

With `--hard` the races are of losses made to break one instead, on each checkpoint's unpruned losses, in float32: the
first five candidates with equal means (the third is best by 1e-7), and twenty of noise alone, of which one looks better
by 0.005 but jumps by 3 on one image of 300, at a noise of 0.1 and 0.02. The cells are the wrong choices.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from conformance import LOGGED
from machine import machine
from torch import nn

from laasp_ray.config import COMPENSATED_CRITERIA, LaaspConfig, ModelConfig, RunConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.models import build, load_weights
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.recipes import recipe
from laasp_ray.search.candidates import counts_of, measure_baseline, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.grams import grams
from laasp_ray.search.racing import Race
from laasp_ray.search.stratified import GROWTH

COLUMNS = (
    "checkpoint",
    "precision",
    "candidates",
    "gaps / s.e.",
    "agree",
    "worst regret",
    "evaluations",
    "most",
    "float32",
    "bfloat16",
    "steps",
    "all",
)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """`losses` (1 + candidates, images), the unpruned network first, `fast` the same in bfloat16; costs in forward
    passes of the whole network.
    """

    losses: np.ndarray
    fast: np.ndarray
    cost: np.ndarray
    ready: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of development data")
    parser.add_argument("--only", nargs="+", choices=LOGGED, default=list(LOGGED), help="these checkpoints only")
    parser.add_argument("--races", type=int, default=200, help="per checkpoint (default 200)")
    parser.add_argument("--matrices", type=Path, help="keep the losses there, and read them from there")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--growth", type=float, default=GROWTH, help=f"search.racing_growth (default {GROWTH})")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--plain", action="store_true", help="the paper's criteria only")
    which.add_argument("--compensated", action="store_true", help="candidates that are made up for only")
    parser.add_argument("--hard", action="store_true", help="losses made to break a race")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    columns = ("checkpoint", "five equal", "jumps, noise 0.1", "jumps, noise 0.02") if options.hard else COLUMNS
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    kinds = [False] if options.plain else [True] if options.compensated else [False, True]
    for compensated, name in itertools.product(kinds, options.only):
        title = f"{name}, compensated" if compensated else name
        kept = options.matrices / f"{title.replace(', ', '-')}.npz" if options.matrices else None
        matrix = read(kept) if kept is not None and kept.is_file() else measured(name, options.data, compensated)
        if kept is not None and not kept.is_file():
            np.savez(kept, **{field.name: getattr(matrix, field.name) for field in dataclasses.fields(matrix)})
        if options.hard:
            print(f"| {title} | " + " | ".join(hard_races(matrix, options.races, options.growth)) + " |", flush=True)
            continue
        for fast in (False, True):
            print(f"| {title} | " + " | ".join(races(matrix, options.races, fast, options.growth)) + " |", flush=True)
    return 0


def races(matrix: Matrix, count: int, fast: bool, growth: float) -> list[str]:
    """The cells of a row."""
    losses = matrix.losses[1:].astype(float)
    base = (matrix.fast if fast else matrix.losses)[0]
    means = losses.mean(1)
    order = np.argsort(means, kind="stable")
    gaps = [
        (means[i] - means[order[0]]) / ((losses[i] - losses[order[0]]).std() / len(base) ** 0.5) for i in order[1:4]
    ]
    agreed, regrets, evaluations, forwards, steps = 0, [], [], [], []
    for seed in range(count):
        race, seen, taken = Race(base, len(losses), growth=growth, seed=seed, fast=fast), 0, 0
        cost = np.array([len(race.sample.images(1)) if fast else len(base), len(base) if fast else 0], float)
        while requests := race.requests():
            taken += 1
            for request in requests:
                some, in_fast = list(request.candidates), fast and request.kind != "full"
                seen += len(some) * len(request.images)
                own, shared = matrix.cost[1:][some].sum(), matrix.ready[1:][some].max()
                cost[int(in_fast)] += len(request.images) * (own + shared)
                found = (matrix.fast[1:] if in_fast else losses)[np.array(some)[:, None], request.images]
                race.finish(request, found)
        assert race.choice is not None
        agreed += int(race.choice == order[0])
        regrets.append(means[race.choice] - means[order[0]])
        evaluations.append(seen / losses.size)
        forwards.append(cost / len(base))
        steps.append(taken)
    in_full, in_fast_too = np.mean(forwards, axis=0)
    return [
        "bfloat16" if fast else "float32",
        str(len(losses)),
        ", ".join(f"{gap:.1f}" for gap in gaps),
        f"{agreed} of {count}",
        f"{max(regrets):.6f}",
        f"{np.mean(evaluations):.1%}",
        f"{max(evaluations):.1%}",
        f"{in_full:.2f}",
        f"{in_fast_too:.2f}",
        f"{np.mean(steps):.0f}",
        f"{1 + matrix.cost[1:].sum():.2f}",
    ]


def hard_races(matrix: Matrix, count: int, growth: float) -> list[str]:
    """The cells of a row of `--hard`."""
    base, losses = matrix.losses[0].astype(float), matrix.losses[1:].astype(float)
    losses[:5] += losses.mean(1).min() - losses[:5].mean(1, keepdims=True)
    losses[2] -= 1e-7
    wrong = [sum(choice_of(base, losses, seed, growth) != 2 for seed in range(count))]
    for noise in (0.1, 0.02):
        found = 0
        for seed in range(count):
            draw = np.random.default_rng(seed)
            noisy = noise * draw.standard_normal((20, len(base)))
            noisy += base - noisy.mean(1, keepdims=True)
            noisy[1] += 3 * (draw.random(len(base)) < 1 / 300) - 0.005
            noisy[2:] += 0.02
            found += choice_of(base, noisy, seed, growth) != noisy.mean(1).argmin()
        wrong.append(found)
    return [f"{number} of {count}" for number in wrong]


def choice_of(base: np.ndarray, losses: np.ndarray, seed: int, growth: float) -> int | None:
    race = Race(base, len(losses), growth=growth, seed=seed)
    while requests := race.requests():
        for request in requests:
            race.finish(request, losses[np.ix_(request.candidates, request.images)])
    return race.choice


def measured(name: str, data: Path, compensated: bool) -> Matrix:
    """Every candidate of a checkpoint on every image."""
    config = recipe("resnet20_cifar10")
    source = dataclasses.replace(config.data, path=str(data / "cifar10_mini"))
    calibration = draw_calibration_images(open_source(source, "train"), source, images=4000, seed=0)
    model = build(ModelConfig(builder=LOGGED[name].builder, input_shape=config.model.input_shape))
    load_weights(model, data / "checkpoints" / f"{name}.safetensors")
    images = CalibrationSet(calibration.images, calibration.labels, 250, lambda batch: normalise(batch, source))
    model = ready(model, torch.device("cpu"))
    tasks, total = tasks_for(model, images, config, compensated)
    engine = Engine(model, images, precision="bfloat16")
    costs = [engine.branch_points.cost(task) for task in tasks]
    return Matrix(
        engine.losses(tasks, np.arange(len(images))).values,
        engine.losses(tasks, np.arange(len(images)), fast=True).values,
        np.array([cost.own / total for cost in costs]),
        np.array([cost.shared / total for cost in costs]),
    )


def tasks_for(
    model: nn.Module, images: CalibrationSet, config: RunConfig, compensated: bool
) -> tuple[list[LossTask], int]:
    """The unpruned network's task and the candidates', and the network's multiply-accumulates."""
    example = torch.zeros(1, *config.model.input_shape)
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    assert isinstance(config.prune, LaaspConfig)
    prune = dataclasses.replace(config.prune, criteria=COMPENSATED_CRITERIA) if compensated else config.prune
    baseline = measure_baseline(graph, macs, prune)
    if not compensated:
        proposals = propose(model, graph, macs, baseline, prune)
    else:
        compensator = CompensationMemory().at(
            model,
            graph,
            "full",
            Measured(capture(model, Plan.empty())),
            lambda network, readers: grams(model, images, readers, 10**9),
        )
        given = {"obs": compensator.obs_scores(model, graph, counts_of(graph, macs, baseline, prune))}
        proposals = propose(model, graph, macs, baseline, prune, given, made_up=compensator.made_up)
    *candidates, unpruned = tasks_of(proposals)
    return [unpruned, *candidates], macs.total


def read(path: Path) -> Matrix:
    with np.load(path) as arrays:
        return Matrix(*(arrays[field.name] for field in dataclasses.fields(Matrix)))


if __name__ == "__main__":
    sys.exit(main())
