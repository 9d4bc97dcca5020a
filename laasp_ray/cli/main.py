"""The commands of `laasp-ray` and of the scripts in jobs/: they turn flags into a config and call the API."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from laasp_ray import api
from laasp_ray.cli.classes import with_classes_of_data
from laasp_ray.cli.flags import SPARSITY_FLAGS, absolute, at_least_1, of_variant, overridden, run_parser
from laasp_ray.cli.status import status
from laasp_ray.cli.stopping import guarded
from laasp_ray.config import ENGINES, ExportConfig, GroupSparsityConfig, RunConfig
from laasp_ray.errors import ConfigError
from laasp_ray.methods.group_sparsity import REPORT
from laasp_ray.methods.sparsity_report import sparsity_from_json
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.recipes import RECIPES, recipe, with_sparsity
from laasp_ray.recipes.digits import resnet50_digits
from laasp_ray.recipes.imagenet import resnet50_imagenet
from laasp_ray.report import repeats
from laasp_ray.report.evaluation import evaluation_table
from laasp_ray.report.sparsity import sparsity_table
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run import evaluate as evaluation
from laasp_ray.run.events import read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

__all__ = ["evaluate", "prune", "prune_resnet50", "sparsify", "status"]
_RECIPE_HELP = f"one of {', '.join(sorted(RECIPES))}, or an import path package.module:function"


def prune_resnet50(arguments: Sequence[str] | None = None) -> int:
    """`jobs/prune_resnet50.py`: the ImageNet recipe with --data, the recipe for the built-in digits without it."""

    def base(options: argparse.Namespace) -> RunConfig:
        if options.data is not None:
            return resnet50_imagenet()
        print(
            "No --data given: pruning ResNet-50 on the embedded handwritten digits (1,797 real images), at a size for\n"
            "two CPU cores, through the same path as ImageNet. With --data /path/to/imagenet it is the full recipe,\n"
            "on the GPUs that the cluster has.",
            file=sys.stderr,
        )
        return resnet50_digits()

    parser = run_parser("prune_resnet50.py", "Prunes torchvision's ResNet-50 while it trains.")
    return guarded(lambda: _prune(parser.parse_args(arguments), base))


def prune(arguments: Sequence[str] | None = None, prog: str = "prune.py") -> int:
    """`laasp-ray prune` and `jobs/prune.py RECIPE`."""
    parser = run_parser(prog, "Prunes a network while it trains, by a recipe.")
    parser.add_argument("recipe", help=_RECIPE_HELP)
    return guarded(lambda: _prune(parser.parse_args(arguments), lambda options: recipe(options.recipe)))


def sparsify(arguments: Sequence[str] | None = None, prog: str = "sparsify.py") -> int:
    """`laasp-ray sparsify` and `jobs/sparsify.py RECIPE`."""
    parser = run_parser(prog, "Makes a network's weights sparse in groups, and trains it on.", SPARSITY_FLAGS)
    parser.add_argument("recipe", help=_RECIPE_HELP)
    return guarded(lambda: _prune(parser.parse_args(arguments), lambda options: with_sparsity(recipe(options.recipe))))


def evaluate(arguments: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """`laasp-ray evaluate` and `jobs/evaluate.py FOLDER`."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, description="Measures a run's pruned and unpruned network."
    )
    parser.add_argument("folder", help="the run's folder, or its s3:// or gs:// address")
    parser.add_argument("--data", help="the data set's folder (default: the run's)")
    parser.add_argument("--format", help="its layout by name, or an import path (default: the run's)")
    parser.add_argument("--batch-size", type=at_least_1, default=100, help="images a batch for accuracy (default 100)")
    parser.add_argument(
        "--latency-batch", type=at_least_1, nargs="+", default=[1, 64], help="images a batch for latency (default 1 64)"
    )
    parser.add_argument(
        "--engines",
        choices=(*ENGINES, "none"),
        nargs="+",
        default=list(ENGINES),
        help=f"what times both networks (default {' '.join(ENGINES)}; compile may take minutes)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the code that the folder names by import path: the network's builder, the data's format, factory and "
        "collate function, the loss, the metrics",
    )

    def run() -> None:
        options = parser.parse_args(arguments)
        if options.json is not None and not options.json.parent.is_dir():
            raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}")
        engines = [] if "none" in options.engines else list(dict.fromkeys(options.engines))
        measured = evaluation.evaluate_run(
            options.folder,
            data=absolute(options.data, "--data"),
            data_format=options.format,
            batch_size=options.batch_size,
            latency=ExportConfig(latency=tuple(engines), latency_batches=tuple(options.latency_batch)),
            trust=options.trust,
        )
        print(evaluation_table(measured))
        if options.json is not None:
            options.json.write_text(json.dumps(evaluation.to_dict(measured), indent=2) + "\n")

    return guarded(run, stopped="stopped")


def _prune(options: argparse.Namespace, base: Callable[[argparse.Namespace], RunConfig]) -> None:
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("laasp_ray").setLevel(logging.INFO)
    config = base(options)
    if "variant" in options:
        config = of_variant(config, getattr(options, "recipe", config.name), options)
    config = with_classes_of_data(overridden(config, options), options)
    if options.dry_run:
        print(
            dry_run(
                config,
                distributed=not options.no_ray,
                ray_address=options.ray_address,
                repeats=options.repeats,
            )
        )
    elif options.repeats is None:
        _run(config, options)
    else:
        _repeat(config, options)


def _run(config: RunConfig, options: argparse.Namespace) -> api.PruneResult:
    result = api.prune(config, distributed=not options.no_ray, ray_address=options.ray_address)
    storage = Storage.open(config.storage).child(config.name)
    print(format_summary(summarise(read_events(Journal(storage)))))
    if isinstance(config.prune, GroupSparsityConfig):
        print(sparsity_table(sparsity_from_json(storage.read_json(REPORT))))
    print(f"{'pruned' if config.prunes else 'trained'} network: {result.folder}/pruned")
    return result


def _repeat(config: RunConfig, options: argparse.Namespace) -> None:
    runs = {}
    for run in repeats.runs_of(config, options.repeats):
        runs[run.name] = repeats.figures_of(_run(run, options).summary)
    content, storage = repeats.collected(runs), Storage.open(config.storage)
    storage.write(f"{config.name}-repeats.json", json.dumps(content, indent=2).encode())
    print(repeats.table(content))
    print(f"{len(runs)} runs: {storage.uri}/{config.name}-repeats.json")
