"""CIFAR-10 whole: ResNet-20 from scratch on all 50,000 images, and what each way to choose makes of it at -50%.

    python bench/cifar10.py --data DATA --runs FOLDER --json FILE [--epochs 36] [--fine-tune 6] [--when end,middle]
                            [--methods laasp_obs-made_up,laasp,l1,uniform,torch_pruning-group_norm] [--seeds 0]
                            [--target 0.5] [--precision auto] [--processes 2] [--threads 1] [--set KEY=VALUE ...]
    python bench/cifar10.py --data DATA --speed

DATA is the folder of development data; the images are those of its `cifar10_jpeg`: all of CIFAR-10, compressed once
more (JPEG, quality 75), so that top-1 is some points below what is usual for the original images. Methods are those of
bench/methods.py, `laasp_obs-made_up` being the default of runs that begin with trained weights. All have iterations
worth 2% of FLOPs, an epoch of fine-tuning whenever 10% are gone, 1,000 calibration images and a cosine schedule.

- `end`: a network is trained for `--epochs` (one for all methods of a seed), pruned, and trained for `--fine-tune`
  epochs at a tenth of the rate.
- `middle`: as the paper does: a schedule of all these epochs together, pruned at half of it. What comes before the
  first prune is trained once, by the first method, and copied.

So all have the same epochs in all. Runs are kept in FOLDER and go on where they were cut off; FILE has the rows so far,
and those in it are not made again. Ctrl-C ends it; the same command goes on. `--speed` times steps of training instead,
on one thread and two, in float32 and bfloat16, and says how long all of it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from machine import machine
from methods import METHODS, Chain, Place, fork, integers, missing, names_of, run_all, settings_of
from methods_table import Row, line_of, read_rows, row_of, table, write_rows
from safetensors.torch import save_file

from laasp_ray import models, prune
from laasp_ray.config import RunConfig
from laasp_ray.errors import LaaspError
from laasp_ray.methods import PruningMethod
from laasp_ray.records import RunState
from laasp_ray.report.progress import LineProgress
from laasp_ray.run.events import Happening, PhaseStarted
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.train.precision import cpu_has_bfloat16
from laasp_ray.train.speed import measure_training

COMPARED = ("laasp_obs-made_up", "laasp", "l1", "uniform", "torch_pruning-group_norm")
WHEN = ("end", "middle")
FINE_TUNE_EVERY = 0.1
IMAGES = 50_000
SHARED = (
    "prune.step=0.02",
    f"prune.fine_tune_every={FINE_TUNE_EVERY}",
    "prune.fine_tune_epochs=1",
    "search.images=1000",
    "data.threads=1",
    "train.schedule=cosine",
    "train.test_every=0",
    "export.format=none",
    "export.latency=[]",
)


@dataclass(frozen=True)
class Budget:
    """The epochs before and after a prune at the end, and how training computes (`train.precision`)."""

    epochs: int
    fine_tune: int
    precision: str

    @property
    def settings(self) -> tuple[str, ...]:
        """What rows of one file have in common."""
        return f"--epochs={self.epochs}", f"--fine-tune={self.fine_tune}", f"--precision={self.precision}"


class Spreading(LineProgress):
    """A run's progress in lines; before its first prune it is copied, for other methods' runs to go on from."""

    def __init__(self, config: RunConfig, following: Mapping[str, RunConfig], stream: TextIO) -> None:
        super().__init__(config.prune.targets, stream, time.monotonic)
        self._config, self._following = config, following

    def on_event(self, event: Happening, state: RunState) -> None:
        super().on_event(event, state)
        if isinstance(event, PhaseStarted) and event.phase == "prune" and state.iteration == 0:
            for label, config in self._following.items():
                method = method_of(label, config)
                name = None if method is None else f"{type(method).__module__}.{type(method).__qualname__}"
                fork(self._config, config, {"method": name})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of development data")
    parser.add_argument("--runs", type=Path, help="the runs' folder; they go on where they were cut off")
    parser.add_argument("--json", type=Path, help="the rows so far; those in it are not made again")
    parser.add_argument(
        "--when", type=partial(names_of, WHEN), default=list(WHEN), help="end, middle or both (default)"
    )
    parser.add_argument(
        "--methods", type=partial(names_of, METHODS), default=list(COMPARED), help="of bench/methods.py"
    )
    parser.add_argument("--seeds", type=integers, default=[0], help="comma-separated (default 0)")
    parser.add_argument("--epochs", type=int, default=36, help="before pruning at the end (default 36)")
    parser.add_argument("--fine-tune", type=int, default=6, help="epochs after it (default 6)")
    parser.add_argument("--target", type=float, default=0.5, help="FLOPs to remove (default 0.5)")
    parser.add_argument("--precision", default="auto", help="of training: train.precision (default auto)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads of each (default 1)")
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs, as the jobs take it")
    parser.add_argument("--speed", action="store_true", help="only time steps of training")
    options = parser.parse_args()
    if options.epochs < 2 or options.fine_tune < 1:
        raise SystemExit("error: --epochs must be at least 2 and --fine-tune at least 1")
    if options.speed:
        return say_speed(options)
    if options.runs is None:
        raise SystemExit("error: --runs FOLDER is missing: hours of training are kept there")
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    budget = Budget(options.epochs, options.fine_tune, options.precision)
    place = Place(options.data, options.runs, tuple(options.set))
    settings = [*budget.settings, *options.set]
    rows = read_rows(options.json, settings) if options.json is not None else []
    labels = [f"{when} {method}" for when in options.when for method in options.methods]
    ran_on = machine("torch-pruning", "nvidia-dali-cuda130")
    try:
        for label in labels:
            config_of(label, options.seeds[0], options.target, place, budget)
    except LaaspError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{ran_on}\n{len(rows)} rows are there", flush=True)
    failed = 0
    for seed in options.seeds:
        for when in options.when:
            wanted = [label for label in labels if label.startswith(f"{when} ")]
            chains = missing(wanted, [seed], [options.target], {row.key for row in rows})
            first = [chain for chain in chains if chain.method == wanted[0]] if when == "middle" else []
            if chains and when == "end":
                torch.set_num_threads(options.threads * options.processes)
                train_base(seed, place, budget)
            others = tuple(label for label in wanted[1:])
            for part, together in ((first, 1), ([chain for chain in chains if chain not in first], options.processes)):
                work = partial(run, budget=budget, others=others if part is first else ())
                threads = options.threads * options.processes // together
                for found in run_all(part, place, together, threads, work):
                    failed += not isinstance(found, Row)
                    print(line_of(found) if isinstance(found, Row) else f"FAILED: {found}", flush=True)
                    if isinstance(found, Row):
                        rows.append(found)
                        if options.json is not None:
                            write_rows(options.json, ran_on, settings, rows)
    print(f"\n{options.target:.0%} fewer FLOPs\n\n{table(rows, options.target, labels)}")
    return 1 if failed else 0


def base_weights(seed: int, place: Place) -> Path:
    return place.runs.absolute() / f"base-seed{seed}.safetensors"


def train_base(seed: int, place: Place, budget: Budget) -> None:
    """Trains the network that all methods prune at the end, or goes on with that."""
    if base_weights(seed, place).exists():
        return
    place.runs.mkdir(parents=True, exist_ok=True)
    config = _config("l1", f"base-seed{seed}", seed, 0.0, place, budget, epochs=budget.epochs, prune_epoch=0, rate=0.1)
    print(f"training the base of seed {seed}: {place.runs / config.name}.log", flush=True)
    with (place.runs / f"{config.name}.log").open("a") as log:
        result = prune(config, distributed=False, progress=LineProgress({}, log, time.monotonic))
    print(f"base of seed {seed}: {result.summary['metrics']}", flush=True)
    aside = base_weights(seed, place).with_suffix(".aside")
    save_file({name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}, aside)
    aside.replace(base_weights(seed, place))


def run(chain: Chain, place: Place, budget: Budget, others: Sequence[str] = ()) -> Row:
    """The run of a chain `WHEN METHOD`. Before its first prune it is copied for those of `others`."""
    (target,) = chain.targets
    config = config_of(chain.method, chain.seed, target, place, budget)
    following = {label: config_of(label, chain.seed, target, place, budget) for label in others}
    place.runs.mkdir(parents=True, exist_ok=True)
    with (place.runs / f"{config.name}.log").open("a") as log:
        prune(
            config,
            distributed=False,
            progress=Spreading(config, following, log),
            method=method_of(chain.method, config),
        )
    events = Journal(Storage.open(config.storage).child(config.name)).events()
    return row_of(chain.method, target, chain.seed, events)


def method_of(label: str, config: RunConfig) -> PruningMethod[Any] | None:
    """What chooses the prunes of the run `WHEN METHOD`, where it is not the library's own."""
    of_run = METHODS[label.split(" ")[1]].of_run
    return None if of_run is None else of_run(config)


def config_of(label: str, seed: int, target: float, place: Place, budget: Budget) -> RunConfig:
    """The run `WHEN METHOD`; raises ConfigError for a setting that is unknown or does not fit."""
    when, method = label.split(" ")
    name = f"{when}-{method}-{target:g}-seed{seed}"
    if when == "middle":
        whole = budget.epochs + budget.fine_tune
        return _config(method, name, seed, target, place, budget, epochs=whole, prune_epoch=whole // 2, rate=0.1)
    config = _config(method, name, seed, target, place, budget, epochs=budget.fine_tune, prune_epoch=0, rate=0.01)
    return replace(config, train=replace(config.train, pretrained=str(base_weights(seed, place))))


def _config(
    method: str,
    name: str,
    seed: int,
    target: float,
    place: Place,
    budget: Budget,
    *,
    epochs: int,
    prune_epoch: int,
    rate: float,
) -> RunConfig:
    shared = (
        *SHARED,
        f"data.path={json.dumps(str(place.data / 'cifar10_jpeg'))}",
        f"storage={json.dumps(str(place.runs.absolute()))}",
        f"train.precision={budget.precision}",
        f"train.epochs={epochs}",
        f"train.prune_epoch={prune_epoch}",
        f"train.learning_rate={rate}",
        *place.further,
        f"seed={seed}",
        f"name={name}",
    )
    return settings_of(method, target, shared)


def say_speed(options: argparse.Namespace) -> int:
    """Times a few steps of training, decoding included, and scales them up."""
    print(machine("torch", "nvidia-dali-cuda130"))
    budget = Budget(options.epochs, options.fine_tune, "float32")
    place = Place(options.data, options.runs or Path("runs"), tuple(options.set))
    phases = math.ceil(options.target / FINE_TUNE_EVERY)  # the last is followed by what comes at the end
    each, whole = phases + options.fine_tune, options.epochs + options.fine_tune
    epochs = ("end" in options.when) * (options.epochs + len(options.methods) * each)
    epochs += ("middle" in options.when) * (whole // 2 + len(options.methods) * (whole - whole // 2 + phases))
    print(f"about {epochs} epochs for each seed, iterations not counted")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for precision in ("float32", "bfloat16"):
            config = config_of(f"middle {options.methods[0]}", 0, options.target, place, budget)
            config = replace(config, train=replace(config.train, precision=precision))
            speed = measure_training(models.build(config.model), config, torch.device("cpu"))
            seconds = IMAGES / speed.training
            print(
                f"{threads} threads, {precision}: {speed.training:.0f} images a second ({speed.loader}), "
                f"{seconds:.0f} s an epoch, {epochs * seconds / 3600:.1f} h for each seed on these threads",
                flush=True,
            )
    print(f"auto is {'bfloat16' if cpu_has_bfloat16() else 'float32'} on this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
