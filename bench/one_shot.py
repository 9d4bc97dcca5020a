"""How much a network still knows after pruning without any training, by each way to choose and with compensation.

    python bench/one_shot.py --data DATA [--network resnet20] [--methods laasp,laasp-made_up,...] [--seeds 0]
                             [--targets 0.1,0.2,0.3,0.4,0.5] [--images 1000] [--threads 2] [--json FILE]

DATA is the folder of development data. The network begins with the authors' checkpoint (ResNet-20 of epoch 130,
ResNet-56 of epoch 60) and loses about 2% of its FLOPs in each iteration; methods are those of bench/methods.py. The
test top-1 is measured when a target is reached. Nothing is trained in between. FILE gets a row for each target, and
those that it has are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from methods import METHODS, integers, names_of, settings_of

from laasp_ray.config import TARGET_ROUNDING, LaaspConfig, RunConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.laasp import Laasp
from laasp_ray.methods.memory import IterationMemory
from laasp_ray.methods.preparation import graph_for
from laasp_ray.models import build, load_weights
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.search.candidates import measure_baseline
from laasp_ray.search.compensating import Measured
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.executor import InProcessExecutor
from laasp_ray.train.data import EvaluationData
from laasp_ray.train.loop import evaluate

CHECKPOINTS = {"resnet20": "resnet20_epoch130", "resnet56": "resnet56_epoch60"}
CPU = torch.device("cpu")
COMPARED = ("laasp_obs-made_up", "laasp", "l1", "l1-made_up", "uniform", "torch_pruning-group_norm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=CHECKPOINTS, default="resnet20")
    parser.add_argument(
        "--methods", type=partial(names_of, METHODS), default=list(COMPARED), help="of bench/methods.py"
    )
    parser.add_argument("--seeds", type=integers, default=[0], help="comma-separated (default 0)")
    parser.add_argument("--targets", default="0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], help="a setting of all, as the jobs take it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("torch"))
    targets = sorted(float(share) for share in options.targets.split(","))
    lines = options.json.read_text().splitlines() if options.json is not None and options.json.exists() else []
    there = {(row["network"], row["method"], row["seed"]) for row in map(json.loads, lines)}
    for seed in options.seeds:
        for method in options.methods:
            if (options.network, method, seed) in there:
                continue
            rows = list(one(options, method, seed, targets))
            print(
                f"{method:>26} seed {seed}: " + "  ".join(f"{r['gone']:.3f} {r['top1']:.4f}" for r in rows), flush=True
            )
            if options.json is not None:
                with options.json.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


class Loop:
    """The loop of a run without its training: one network that is pruned iteration by iteration."""

    def __init__(self, config: RunConfig, weights: Path, images: int, seed: int, way: PruningMethod[Any]) -> None:
        self.config, self.way = config, way
        self.model = build(config.model)
        load_weights(self.model, weights)
        self._example = torch.zeros(1, *config.model.input_shape)
        drawn = draw_calibration_images(open_source(config.data, "train"), config.data, images=images, seed=seed)
        calibration = CalibrationSet(
            drawn.images, drawn.labels, config.search.batch_size, lambda batch: normalise(batch, config.data)
        )
        self._executor = InProcessExecutor(self.model, calibration, CPU, config.search, seed)
        graph = graph_for(config.prune, self.model, self._example)
        assert isinstance(config.prune, LaaspConfig)
        self._baseline = measure_baseline(graph, count_macs(self.model, self._example), config.prune)
        self.network, self._memory = capture(self.model, Plan.empty()), IterationMemory()
        self._measured, self.iterations, self.gone = Measured(self.network), 0, 0.0

    def step(self) -> IterationResult:
        """One iteration; the network is pruned afterwards."""
        self.iterations += 1
        result = self.way.iterate(
            IterationContext(
                model=rebuild(self.model, self.network).eval(),
                network=self.network,
                example_input=self._example,
                baseline=self._baseline,
                config=self.config.prune,
                executor=self._executor,
                iteration=self.iterations,
                on_candidate=lambda done, total, latest: None,
                memory=self._memory,
                measured=self._measured,
            )
        )
        assert result.step is not None and result.decision is not None
        pruned = rebuild(self.model, self.network)
        apply_plan(pruned, result.step)
        found = capture(pruned, self.network.plan.then(result.step))
        self.network = NetworkState(found.plan, {**found.tensors, **result.weights})
        self._measured = self._measured.after(result.step, self.network)
        self.gone = result.decision.flops_reduction
        return result


def one(options: argparse.Namespace, method: str, seed: int, targets: list[float]) -> Iterator[dict[str, Any]]:
    """The rows of a method: one before the first prune, one for each target."""
    config = config_of(options, method, seed, targets[-1])
    chooser = METHODS[method].of_run
    weights = options.data / "checkpoints" / f"{CHECKPOINTS[options.network]}.safetensors"
    loop = Loop(config, weights, options.images, seed, Laasp() if chooser is None else chooser(config))
    test = EvaluationData(open_source(config.data, "test"), config.data, batch_size=250, seed=0, device=CPU)
    increase, began = 0.0, time.process_time()

    def row() -> dict[str, Any]:
        metrics = evaluate(rebuild(loop.model, loop.network).eval(), test)
        return {
            "network": options.network,
            "method": method,
            "seed": seed,
            "gone": round(loop.gone, 4),
            "top1": metrics.top1,
            "loss": metrics.loss,
            "increases": round(increase, 4),
            "iterations": loop.iterations,
            "cpu_s": round(time.process_time() - began, 1),
        }

    yield row()
    for target in targets:
        while loop.gone < target - TARGET_ROUNDING:
            decision = loop.step().decision
            assert decision is not None
            increase += decision.loss - decision.loss_before
        yield row()
    test.close()


def config_of(options: argparse.Namespace, method: str, seed: int, target: float) -> RunConfig:
    settings = (
        f"data.path={json.dumps(str(options.data / 'cifar10_mini'))}",
        "data.threads=1",
        f"search.images={options.images}",
        f"seed={seed}",
        "prune.step=0.02",
        *options.set,
    )
    return settings_of(method, target, settings, f"{options.network}_cifar10")


if __name__ == "__main__":
    sys.exit(main())
