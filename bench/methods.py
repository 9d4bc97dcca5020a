"""Is choosing by the loss worth it? LAASP beside single criteria, PLS, uniform l1 and random prunes, on one budget.

    python bench/methods.py --data DATA [--json FILE] [--methods laasp,uniform,...] [--seeds 0,1,2] [--targets 0.3,0.5]
                            [--runs FOLDER] [--processes 2] [--threads 1] [--set KEY=VALUE ...]

DATA is the folder of development data: every run begins with `checkpoints/resnet20_epoch130` and `cifar10_mini`, and
differs from the others in what it prunes, or in the one option that its name says. All have iterations worth about 2%
of FLOPs, an epoch of fine-tuning whenever 5% are gone, 1,000 calibration images and 5 final epochs, at the learning
rate that the recipe has at epoch 130. A seed draws the calibration images, their augmentation, the order of images in
training, and random prunes. The run to one target is the run to the next one up to its final epochs, and made once.

- `laasp`: all layers, criteria l1, l2, euclidean, cosine. `l1` to `cosine`: that criterion alone.
- `pls`: by VIP over the layers inside the blocks, at the percentage that makes each iteration worth most nearly 2%.
- `uniform`: all layers lose the same share of their filters, lowest l1 first. `random`: random filters of any layer.
- `torch_pruning-...`: that library's own pruner, over all layers at once.
- `...-made_up`: with compensation (prune.compensate=full, prune.reestimate_batchnorm). `obs`: that criterion alone.
  `laasp_obs`: LAASP with obs in its pool.
- `laasp-...`: LAASP with one option, or without one criterion of its pool; `laasp_obs-made_up-...` likewise. The
  cosine schedule begins its final epochs at the others' learning rate. Where parameters or latency are the target, it
  is a third or two thirds of that for FLOPs: a run to 31% fewer FLOPs had 11% fewer parameters and 21% less latency.
  Three prunes an iteration are taken from all candidates on all images: racing would drop most of them.

A row is a method, target and seed: test top-1 and loss after the last epoch, what is gone, and seconds of iterations,
epochs and evaluations (of `--processes` runs side by side). FILE has the rows so far; with the same FILE those are not
made again. Runs are kept in FOLDER, if given, and go on where they were cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from baselines import PlsByFlops, RandomPruning, TorchPruning, UniformPruning
from machine import machine
from methods_table import Row, line_of, read_rows, row_of, table, verdict, write_rows

from laasp_ray import prune
from laasp_ray.cli.flags import overridden
from laasp_ray.config import RunConfig
from laasp_ray.errors import LaaspError
from laasp_ray.methods import PruningMethod
from laasp_ray.recipes import recipe
from laasp_ray.records import RunState
from laasp_ray.report.progress import LineProgress
from laasp_ray.run.events import Happening, PhaseStarted
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

RECIPE = "resnet20_cifar10"
BUDGET = (
    "train.prune_epoch=130",
    "train.epochs=135",
    "prune.step=0.02",
    "prune.fine_tune_every=0.05",
    "prune.fine_tune_epochs=1",
    "search.images=1000",
    "data.threads=1",
    "train.test_every=0",
    "export.format=none",
    "export.latency=[]",
)


@dataclass(frozen=True)
class Method:
    """`settings` and those of `target` (which is a share) are what `--set` of the jobs takes. `of_run` gives what
    chooses a run's prunes, where it is not the library's own."""

    settings: tuple[str, ...] = ()
    target: Callable[[float], tuple[str, ...]] = lambda share: (f"prune.flops_reduction={share}",)
    of_run: Callable[[RunConfig], PruningMethod] | None = None


COMPARED = {
    "laasp": Method(),
    **{name: Method((f'prune.criteria=["{name}"]',)) for name in ("l1", "l2", "euclidean", "cosine")},
    "pls": Method((), of_run=lambda config: PlsByFlops()),
    "uniform": Method(of_run=lambda config: UniformPruning()),
    "random": Method(of_run=lambda config: RandomPruning(config.seed)),
    "torch_pruning-group_norm": Method(of_run=lambda config: TorchPruning("GroupMagnitudeImportance")),
    "torch_pruning-lamp": Method(of_run=lambda config: TorchPruning("LAMPImportance")),
    "torch_pruning-taylor": Method(of_run=lambda config: TorchPruning("GroupTaylorImportance", config)),
}
MADE_UP = ("prune.compensate=full", "prune.reestimate_batchnorm=true")
POOL = 'prune.criteria=["l1", "l2", "euclidean", "cosine", "obs"]'
COMPENSATED = {
    **{f"{name}-made_up": replace(method, settings=(*method.settings, *MADE_UP)) for name, method in COMPARED.items()},
    "obs": Method(('prune.criteria=["obs"]',)),
    "obs-made_up": Method(('prune.criteria=["obs"]', *MADE_UP)),
    "laasp_obs": Method((POOL,)),
    "laasp_obs-made_up": Method((POOL, *MADE_UP)),
    "l1_obs-made_up": Method(('prune.criteria=["l1", "obs"]', *MADE_UP)),
    "laasp_obs-made_up_channels": Method((POOL, "prune.compensate=channels", MADE_UP[1])),
    "laasp_obs-made_up_statistics_kept": Method((POOL, MADE_UP[0])),
}
DEFAULT = "laasp_obs-made_up"
"""What runs that begin with trained weights do by default."""
CHANGES = {
    "distillation": Method(("train.distill=0.5",)),
    "label_smoothing": Method(("train.label_smoothing=0.1",)),
    "ema": Method(("train.ema=0.99",)),
    "cosine_schedule": Method(("train.schedule=cosine",)),
    "batchnorm": Method(("search.reestimate_batchnorm=true",)),
    "round_to_8": Method(("prune.round_to=8",)),
    "parameters": Method(
        target=lambda share: ("prune.flops_reduction=0", f"prune.parameters_reduction={share / 3:.3f}")
    ),
    "latency": Method(target=lambda share: ("prune.flops_reduction=0", f"prune.latency_reduction={share * 2 / 3:.3f}")),
    "three_prunes": Method(("prune.prunes_per_iteration=3", "search.racing=off")),
}
OPTIONS = {
    f"{name}-{change}": replace(option, settings=(*(COMPARED | COMPENSATED)[name].settings, *option.settings))
    for name in ("laasp", DEFAULT)
    for change, option in CHANGES.items()
}
OPTIONS["laasp-without_cosine"] = Method(('prune.criteria=["l1", "l2", "euclidean"]',))
OPTIONS[f"{DEFAULT}-without_cosine"] = Method(('prune.criteria=["l1", "l2", "euclidean", "obs"]', *MADE_UP))
METHODS = COMPARED | COMPENSATED | OPTIONS


@dataclass(frozen=True)
class Chain:
    """The runs of a method and a seed to rising targets, each going on from the one before."""

    method: str
    seed: int
    targets: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """Where the data is and runs are kept; `further` settings are those of the command line."""

    data: Path
    runs: Path
    further: tuple[str, ...]


class Forking(LineProgress):
    """A run's progress in lines; before its final epochs it is copied, for the run to the next target to go on from."""

    def __init__(self, config: RunConfig, following: RunConfig | None, stream: TextIO) -> None:
        super().__init__(config.prune.targets, stream, time.monotonic)
        self._config, self._following = config, following

    def on_event(self, event: Happening, state: RunState) -> None:
        super().on_event(event, state)
        if isinstance(event, PhaseStarted) and event.phase == "final" and self._following is not None:
            fork(self._config, self._following)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of development data")
    parser.add_argument("--json", type=Path, help="the rows so far; those in it are not made again")
    parser.add_argument(
        "--methods", type=partial(names_of, METHODS), default=list(COMPARED), help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="comma-separated (default 0,1,2)")
    parser.add_argument("--targets", type=_shares, default=[0.3, 0.5], help="FLOPs to remove (default 0.3,0.5)")
    parser.add_argument("--runs", type=Path, help="keep the runs there, and go on with them (default: not kept)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads of each (default 1)")
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs, as the jobs take it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(options.data, options.runs or Path(scratch), tuple(options.set))
        return compare(place, options)


def compare(place: Place, options: argparse.Namespace) -> int:
    rows = read_rows(options.json, options.set) if options.json is not None else []
    chains = missing(options.methods, options.seeds, options.targets, {row.key for row in rows})
    try:
        configs = [config_of(c.method, c.seed, target, place) for c in chains for target in c.targets]
    except LaaspError as error:
        raise SystemExit(f"error: {error}") from error
    ran_on = machine("torch-pruning", "nvidia-dali-cuda130")
    print(f"{ran_on}\n{options.processes} runs side by side, {len(rows)} rows are there, {len(configs)} to make")
    for rate in {f"{config.train.learning_rate_at(config.train.prune_epoch):.6g}" for config in configs}:
        print(f"learning rate of fine-tunings and the first final epoch: {rate}", flush=True)
    failed = 0
    for found in run_all(chains, place, options.processes, options.threads):
        if isinstance(found, Row):
            rows.append(found)
            if options.json is not None:
                write_rows(options.json, ran_on, options.set, rows)
        failed += not isinstance(found, Row)
        print(line_of(found) if isinstance(found, Row) else f"FAILED: {found}", flush=True)
    for target in options.targets:
        print(f"\n{target:.0%} fewer FLOPs\n\n{table(rows, target, list(METHODS))}\n")
        for figure in ("top1", "loss"):
            print(verdict(rows, target, figure, "laasp", COMPARED))
            print(verdict(rows, target, figure, DEFAULT, COMPARED | COMPENSATED))
    return 1 if failed else 0


def missing(
    methods: Sequence[str], seeds: Sequence[int], targets: Sequence[float], there: Collection[tuple[str, float, int]]
) -> list[Chain]:
    """What is yet to be run; all methods with the first seed come first."""
    chains = []
    for seed in seeds:
        for method in methods:
            left = tuple(target for target in targets if (method, target, seed) not in there)
            if left:
                chains.append(Chain(method, seed, left))
    return chains


def run_all(
    chains: Sequence[Chain],
    place: Place,
    processes: int,
    threads: int,
    work: Callable[[Chain, Any], Row] | None = None,
) -> Iterator[Row | str]:
    """The rows as they are made, `processes` at a time; of a run that failed what went wrong: its chain ends there.

    `work` makes the first row of a chain (default: `run`).
    """
    waiting, running = deque(chains), dict[Future[Row], Chain]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=begin, initargs=(threads,)) as pool:
        while waiting or running:
            while waiting and len(running) < processes:
                chain = waiting.popleft()
                running[pool.submit(work or run, chain, place)] = chain
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                chain = running.pop(future)
                try:
                    yield future.result()
                except LaaspError as error:
                    yield f"{chain.method}, {chain.targets[0]:.0%}, seed {chain.seed}: {type(error).__name__}: {error}"
                    continue
                if chain.targets[1:]:
                    waiting.appendleft(dataclasses.replace(chain, targets=chain.targets[1:]))


def begin(threads: int) -> None:
    """Of a process that runs: it ends with the one that started it, or it would go on writing beside the next one."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run(chain: Chain, place: Place) -> Row:
    """The first run of the chain, or what is left of it; ready for the second to go on from."""
    config, *following = [config_of(chain.method, chain.seed, target, place) for target in chain.targets[:2]]
    of_run = METHODS[chain.method].of_run
    place.runs.mkdir(parents=True, exist_ok=True)
    with (place.runs / f"{config.name}.log").open("a") as log:
        prune(
            config,
            distributed=False,
            progress=Forking(config, following[0] if following else None, log),
            method=of_run(config) if of_run is not None else None,
        )
    events = Journal(Storage.open(config.storage).child(config.name)).events()
    return row_of(chain.method, chain.targets[0], chain.seed, events)


def fork(config: RunConfig, following: RunConfig, change: Mapping[str, Any] | None = None) -> None:
    """Copies the run of `config`, about to begin its final epochs, as one of `following`, which prunes further.

    Done only once; and not for a run that was cut off in its final epochs: the weights from before are gone. `change`
    is what else the copy's first event says otherwise.
    """
    source, goal = (Path(each.storage) / each.name for each in (config, following))
    epoch = Journal(Storage.open(str(source))).last("epoch")
    if goal.exists() or (epoch is not None and epoch.data["phase"] == "final"):
        return
    aside = goal.with_name(f"{goal.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns("config.json", "tensorboard"))
    (start,) = (aside / "journal").glob("*-start.json")
    event = json.loads(start.read_text())
    event["data"] |= {"config": following.to_dict(), **(change or {})}
    start.write_text(json.dumps(event))
    (aside / "config.json").write_text(json.dumps(following.to_dict(), indent=2))
    aside.rename(goal)


def config_of(method: str, seed: int, target: float, place: Place) -> RunConfig:
    """A run of the comparison; raises ConfigError for a setting that is unknown or does not fit.

    The learning rate is scaled so that it is the same for all at the epoch at which they prune.
    """
    shared = (
        *BUDGET,
        f"data.path={json.dumps(str(place.data / 'cifar10_mini'))}",
        f"train.pretrained={json.dumps(str(place.data / 'checkpoints' / 'resnet20_epoch130.safetensors'))}",
        f"storage={json.dumps(str(place.runs.absolute()))}",
        *place.further,
        f"seed={seed}",
        f"name={method}-{target:g}-seed{seed}",
    )

    config = settings_of(method, target, shared)
    plain, train = overridden(recipe(RECIPE), argparse.Namespace(flags={}, set=[*shared])).train, config.train
    scale = plain.learning_rate_at(plain.prune_epoch) / train.learning_rate_at(train.prune_epoch)
    return dataclasses.replace(config, train=dataclasses.replace(train, learning_rate=train.learning_rate * scale))


def settings_of(method: str, target: float, shared: Sequence[str], name: str = RECIPE) -> RunConfig:
    """The recipe `name` with the settings `shared`, those of the method, and its target."""
    chosen = METHODS[method]
    settings = [*shared, *chosen.settings, *chosen.target(target)]
    return overridden(recipe(name), argparse.Namespace(flags={}, set=settings))


def names_of(known: Collection[str], text: str) -> list[str]:
    """Comma-separated names of known ones, for argparse."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _shares(text: str) -> list[float]:
    """Rising: the run to a target is the beginning of the run to the next."""
    return sorted({float(number) for number in text.split(",")})


if __name__ == "__main__":
    sys.exit(main())
