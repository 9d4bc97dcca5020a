"""`laasp-ray sweep` and `jobs/sweep_flops.py`: several targets, or the largest reduction within a drop."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from laasp_ray.cli.classes import with_classes_of_data
from laasp_ray.cli.flags import FILTER_FLAGS, at_least_1, of_variant, overridden, run_parser
from laasp_ray.cli.stopping import guarded
from laasp_ray.config import RunConfig
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.recipes import RECIPES, recipe
from laasp_ray.report import repeats
from laasp_ray.report.sweep import SweepRow, counted, sweep_table
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.goals import Goal, MaxDrop, SpaceSearch, Targets, WithinLatency, checked_targets
from laasp_ray.sweep.plan import dry_run
from laasp_ray.sweep.run import BEST_WITHIN, SweepResult, run_sweep
from laasp_ray.sweep.space import check_space, read_space

_FLAGS = {
    name: flag
    for name, flag in FILTER_FLAGS.items()
    if name not in ("--flops-reduction", "--parameters-reduction", "--latency-reduction")
}
_SUFFIX = "-sweep"
_TRIALS = 10
_BEST = "best"


def sweep(arguments: Sequence[str] | None = None, prog: str = "sweep_flops.py") -> int:
    """`laasp-ray sweep` and `jobs/sweep_flops.py RECIPE --flops-reduction 0.3 0.42 0.54`."""
    parser = _parser(prog)
    return guarded(
        lambda: _sweep(parser.parse_args(arguments)), stopped="stopped; the same command goes on with the sweep"
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = run_parser(
        prog,
        "Prunes a network to several targets, or finds the largest reduction within a drop of accuracy. The prunes are "
        "made once, and every trial begins where its target is reached.",
        _FLAGS,
    )
    parser.add_argument(
        "recipe", help=f"one of {', '.join(sorted(RECIPES))}, or an import path package.module:function"
    )
    parser.add_argument(
        "--flops-reduction",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="target shares of FLOPs to remove, 0 to 1; with --max-drop one, the deepest to look at (default: the "
        "recipe's)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="find the largest reduction whose top-1 after the final training is at most so many points lower; with a "
        "loss of your own in the unit of its first metric, or of the loss",
    )
    parser.add_argument(
        "--base-top1",
        type=float,
        metavar="PERCENT",
        help="with --max-drop: lower than this (default: the network's just before its first prune)",
    )
    parser.add_argument(
        "--latency-ms", type=float, metavar="MS", help="find the best accuracy within this measured median latency"
    )
    parser.add_argument(
        "--space", metavar="FILE", help="search further settings beside the targets: YAML, or Python with SPACE"
    )
    parser.add_argument(
        "--trials", type=at_least_1, metavar="N", help=f"trials of each target with --space (default {_TRIALS})"
    )
    parser.add_argument(
        "--concurrent", type=int, metavar="N", help="runs at a time (default: as many as fit, of --workers each)"
    )
    parser.add_argument(
        "--best-within",
        type=float,
        metavar="POINTS",
        help=f"the best of several targets is the deepest that loses at most so many points (default {BEST_WITHIN:g})",
    )
    return parser


def _goal(options: argparse.Namespace) -> Goal:
    kinds = {"--max-drop": options.max_drop, "--latency-ms": options.latency_ms, "--space": options.space}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} ask for two different sweeps: give one of them")
    shares = options.flops_reduction or []
    if options.no_ray and options.concurrent is not None:
        raise ConfigError("--concurrent is of a cluster: with --no-ray trials run one after the other; leave one out")
    if options.base_top1 is not None and options.max_drop is None:
        raise ConfigError("--base-top1 goes with --max-drop")
    if options.trials is not None and options.space is None:
        raise ConfigError("--trials goes with --space: every other sweep knows itself how many it makes")
    if options.best_within is not None and (options.max_drop is not None or options.latency_ms is not None):
        raise ConfigError(f"--best-within chooses one of several targets: {given[0]} says itself which is the best")
    if options.max_drop is not None:
        if len(shares) > 1:
            raise ConfigError("--max-drop looks at one trajectory: give one --flops-reduction, the deepest to look at")
        return MaxDrop(options.max_drop, options.base_top1)
    if options.latency_ms is not None:
        if shares:
            raise ConfigError("--latency-ms ends pruning by the latency alone: leave out --flops-reduction")
        return WithinLatency(options.latency_ms)
    targets = checked_targets(shares)
    if options.space is not None:
        return SpaceSearch(targets, read_space(options.space), options.trials or _TRIALS)
    return Targets(targets)


def _sweep(options: argparse.Namespace) -> None:
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    goal = _goal(options)
    config = with_classes_of_data(
        overridden(of_variant(recipe(options.recipe), options.recipe, options), options), options
    )
    if any(text.startswith("prune.exact_target") for text in options.set):
        raise ConfigError(
            "prune.exact_target is of a run by itself: a sweep's trials share their prunes, and overshoot their "
            "targets by up to a step; leave it out"
        )
    if not any(text.startswith("export.latency") for text in options.set):
        # Trials run side by side; the sweep times their networks at its end, one after the other.
        config = replace(config, export=replace(config.export, latency=()))
    if options.name is None:
        config = replace(config, name=config.name + _SUFFIX)  # beside runs of the recipe
    if options.flops_reduction:
        config = _with_target(config, max(options.flops_reduction))
    if isinstance(goal, SpaceSearch):
        check_space(goal.space, config)
    if options.dry_run:
        print(
            dry_run(
                config,
                goal,
                distributed=not options.no_ray,
                ray_address=options.ray_address,
                concurrent=options.concurrent,
                repeats=options.repeats or 1,
            )
        )
    elif options.repeats is None:
        _run(config, goal, options)
    else:
        _repeat(config, goal, options)


def _with_target(config: RunConfig, share: float) -> RunConfig:
    settings = config.to_dict()
    settings["prune"] |= {"flops_reduction": share, "parameters_reduction": 0, "latency_reduction": 0}
    return RunConfig.from_dict(settings)


def _run(config: RunConfig, goal: Goal, options: argparse.Namespace) -> SweepResult:
    result = run_sweep(
        config,
        goal,
        distributed=not options.no_ray,
        ray_address=options.ray_address,
        concurrent=options.concurrent,
        best_within=options.best_within,
    )
    print(sweep_table(result.rows, result.best))
    print(f"best ({result.content['rule']}): {result.said}")
    print(f"sweep: {result.folder}: sweep.json, pareto.png, and a run's folder for each trial")
    if result.failure:
        raise SearchError(result.failure)
    return result


def _repeat(config: RunConfig, goal: Goal, options: argparse.Namespace) -> None:
    """A sweep for each seed; the mean and the spread of their best ones and, where all seeds have the same targets, of
    each target.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in repeats.runs_of(config, options.repeats):
        result = _run(one, goal, options)
        for row in filter(attrgetter("is_finished"), result.rows):
            figures = {row.metric: _figure_of(row), "flops_reduction": row.flops_reduction or 0.0}
            if isinstance(goal, Targets):
                found.setdefault(row.name, {})[one.name] = figures
            if row.name == result.best:
                found.setdefault(_BEST, {})[one.name] = figures
    content = {name: repeats.collected(runs) for name, runs in sorted(found.items())}
    storage = Storage.open(config.storage)
    storage.write(f"{config.name}-repeats.json", json.dumps(content, indent=2).encode())
    for name, spread in content.items():
        print(f"\n{name}\n{repeats.table(spread)}")
    without = options.repeats - len(found.get(_BEST, {}))
    if without:
        print(f"{without} of {counted(options.repeats, 'sweep')} found no best one")
    print(f"{counted(options.repeats, 'sweep')}: {storage.uri}/{config.name}-repeats.json")


def _figure_of(row: SweepRow) -> float:
    """What networks are compared by, as in the figures of runs: top-1 is a share."""
    value = row.measure.value(row.score_after or 0.0)
    return value / 100 if row.measure.is_top1 else value
