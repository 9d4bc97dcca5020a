"""Flags to config to api: what the scripts in jobs/ are thin mains of.

Exit status 0: done; 2: what was given is wrong (settings, data, store); 1: the run failed; 130 and 143: stopped, by
Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laasp_ray import api, models
from laasp_ray.config import RunConfig
from laasp_ray.config.compat import RENAMED_KEYS, current_name
from laasp_ray.errors import ConfigError, DataError, LaaspError, StoreError
from laasp_ray.methods.group_sparsity import REPORT
from laasp_ray.methods.sparsity_report import sparsity_from_json
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.recipes import RECIPES, VARIANTS, recipe, with_sparsity
from laasp_ray.recipes.digits import resnet50_digits
from laasp_ray.recipes.imagenet import resnet50_imagenet
from laasp_ray.report import repeats
from laasp_ray.report.evaluation import evaluation_table
from laasp_ray.report.sparsity import sparsity_table
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run import evaluate as evaluation
from laasp_ray.run.events import read_events
from laasp_ray.store.addresses import public_text
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable that Ray sets for the drivers of submitted jobs."""

Flags = Mapping[str, tuple[str, Callable[[str], Any], str]]

FLAGS: Flags = {
    # flag: (dotted config key, type, help)
    "--data": ("data.path", str, "the data set's folder"),
    "--storage": ("storage", str, "where runs are kept: a folder, or an s3:// or gs:// address"),
    "--name": ("name", str, "the run's name; the same name goes on with the run"),
    "--flops-reduction": (
        "prune.flops_reduction",
        float,
        "target share of multiply-accumulates to remove, 0 to 1; 0 and no other target: the network is only trained",
    ),
    "--parameters-reduction": (
        "prune.parameters_reduction",
        float,
        "target share of parameters to remove, 0 to 1; without --flops-reduction there is no target for FLOPs then",
    ),
    "--latency-reduction": (
        "prune.latency_reduction",
        float,
        "target share by which the measured median latency is to fall; here too the one for FLOPs is left out",
    ),
    "--pretrained": (
        "train.pretrained",
        str,
        "weights of the network as it stands at the prune epoch: a state dict (.safetensors, .pt, .pth) or "
        "torchvision's by name, torchvision:IMAGENET1K_V2; pruning comes first, training goes on at that epoch's "
        "learning rate; for a finished network give a late --prune-epoch",
    ),
    "--prune-epoch": ("train.prune_epoch", int, "the epoch of the schedule at which pruning begins"),
    "--epochs": ("train.epochs", int, "epochs of the whole schedule"),
    "--batch-size": (
        "train.batch_size",
        int,
        "global batch, over all workers; the learning rate is not scaled with it: --set train.learning_rate=...",
    ),
    "--calibration-images": ("search.images", int, "training images that a candidate's loss is measured on"),
    "--criteria": ("prune.criteria", str, "pool of criteria, comma-separated: names or package.module:function"),
    "--method": (
        "prune.method",
        str,
        "laasp: the cheapest prune of one layer; pls: the filters that tell least",
    ),
    "--iterations": (
        "prune.iterations",
        int,
        "iterations after which pruning ends even short of the target (0: no bound)",
    ),
    "--percent": (
        "prune.percent",
        float,
        "pls: the percentage of the filters still prunable that an iteration removes",
    ),
    "--components": ("prune.components", int, "pls: components of the partial least squares"),
    "--pooling": ("prune.pooling", str, "pls: max or avg of a filter's whole output, or of windows, such as max2x2"),
    "--workers": ("cluster.workers", int, "Ray Train workers (default: one per GPU, or two on CPUs)"),
    "--seed": ("seed", int, "the one source of randomness"),
}

_RENAMED_FLAGS = {"--loss-images": "--calibration-images"}
_OTHER_TARGETS = ("--parameters-reduction", "--latency-reduction")
_PLS_FLAGS = ("--method", "--iterations", "--percent", "--components", "--pooling")
_FILTER_FLAGS = ("--flops-reduction", *_OTHER_TARGETS, "--calibration-images", "--criteria", *_PLS_FLAGS)
_RECIPE_HELP = f"one of {', '.join(sorted(RECIPES))}, or an import path package.module:function"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


SPARSITY_FLAGS: Flags = {
    "--group": ("sparsity.group", int, "consecutive inputs of a layer that make a group"),
    "--prune": ("sparsity.prune", int, "weights of each group that are pruned from convolutions"),
    "--fc-prune": (
        "sparsity.fc_prune",
        _numbers,
        "the same for linear layers, one number or one for each, comma-separated (default: they stay dense)",
    ),
    "--stages": ("sparsity.stages", _numbers, "numbers pruned, comma-separated, rising to --prune, trained in between"),
    "--epochs-per-stage": ("prune.fine_tune_epochs", int, "epochs after each stage but the last"),
    "--from-run": ("sparsity.from_run", str, "the folder of a finished run whose pruned network is begun with"),
    **{flag: entry for flag, entry in FLAGS.items() if flag not in _FILTER_FLAGS},
}


def prune_resnet50(arguments: Sequence[str] | None = None) -> int:
    """`jobs/prune_resnet50.py`: ImageNet's recipe with --data, the embedded digits' without."""

    def base(options: argparse.Namespace) -> RunConfig:
        if options.data is not None:
            return resnet50_imagenet()
        print(
            "No --data given: pruning ResNet-50 on the handwritten digits that scikit-learn carries (1,797 real\n"
            "images), at a size for two CPU cores, through the same path as ImageNet. With --data /path/to/imagenet\n"
            "it is the full recipe, on the GPUs that the cluster has.",
            file=sys.stderr,
        )
        return resnet50_digits()

    parser = _parser("prune_resnet50.py", "Prunes torchvision's ResNet-50 while it trains.")
    return _guarded(lambda: _prune(parser.parse_args(arguments), base))


def prune(arguments: Sequence[str] | None = None) -> int:
    """`jobs/prune.py RECIPE`."""
    parser = _parser("prune.py", "Prunes a network while it trains, by a recipe.")
    parser.add_argument("recipe", help=_RECIPE_HELP)
    parser.add_argument("--variant", help=f"another published setting of the recipe: {', '.join(VARIANTS)}")
    return _guarded(
        lambda: _prune(parser.parse_args(arguments), lambda options: recipe(options.recipe, options.variant))
    )


def sparsify(arguments: Sequence[str] | None = None) -> int:
    """`jobs/sparsify.py RECIPE`."""
    parser = _parser("sparsify.py", "Makes a network's weights sparse in groups, and trains it on.", SPARSITY_FLAGS)
    parser.add_argument("recipe", help=_RECIPE_HELP)
    return _guarded(lambda: _prune(parser.parse_args(arguments), lambda options: with_sparsity(recipe(options.recipe))))


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`jobs/evaluate.py FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False, description="Measures a run's pruned and unpruned network."
    )
    parser.add_argument("folder", help="the run's folder, or its s3:// or gs:// address")
    parser.add_argument("--data", help="the data set's folder (default: the run's)")
    parser.add_argument("--format", help="its layout by name, or an import path (default: the run's)")
    parser.add_argument("--batch-size", type=_at_least_1, default=100, help="images a batch for accuracy (default 100)")
    parser.add_argument("--latency-batch", type=_at_least_1, default=1, help="images a batch for latency (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the code that the folder names: its network's builder, its data's format",
    )

    def run() -> None:
        options = parser.parse_args(arguments)
        if options.json is not None and not options.json.parent.is_dir():
            raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}")
        measured = evaluation.evaluate_run(
            options.folder,
            data=_absolute(options.data, "--data"),
            data_format=options.format,
            batch_size=options.batch_size,
            latency_batch=options.latency_batch,
            trust=options.trust,
        )
        print(evaluation_table(measured))
        if options.json is not None:
            options.json.write_text(json.dumps(evaluation.to_dict(measured), indent=2) + "\n")

    return _guarded(run, stopped="stopped")


def _parser(prog: str, description: str, flags: Flags = FLAGS) -> argparse.ArgumentParser:
    # Abbreviations would have jobs/prune.py take --prune, which jobs/sparsify.py has, for --prune-epoch.
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.set_defaults(flags=flags)
    for flag, (key, kind, text) in flags.items():
        parser.add_argument(flag, type=kind, default=None, help=f"{text} [{key}]")
    for old, new in _RENAMED_FLAGS.items():
        if new in flags:
            parser.add_argument(
                old, type=flags[new][1], dest=new[2:].replace("-", "_"), action=_Renamed, help=argparse.SUPPRESS
            )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting, dotted, the value as JSON: --set prune.step=0.02 (may be repeated)",
    )
    parser.add_argument(
        "--ray-address", default=None, help="a cluster to join (default: RAY_ADDRESS, or start one here)"
    )
    parser.add_argument("--no-ray", action="store_true", help="one process, no Ray: for small networks")
    parser.add_argument(
        "--repeats",
        type=_at_least_1,
        default=None,
        metavar="N",
        help="N runs, NAME-seedK, with the seeds from --seed on; their mean and spread go to NAME-repeats.json",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and how long it would take")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


class _Renamed(argparse.Action):
    """A flag of an earlier version: its value is taken, and its new name said."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        current_name(option_string or "", _RENAMED_FLAGS)
        setattr(namespace, self.dest, values)


def _prune(options: argparse.Namespace, base: Callable[[argparse.Namespace], RunConfig]) -> None:
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("laasp_ray").setLevel(logging.INFO)
    config = overridden(base(options), options)
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
    result = api.prune(None, config, distributed=not options.no_ray, ray_address=options.ray_address)
    storage = Storage.open(config.storage).child(config.name)
    print(format_summary(summarise(read_events(Journal(storage)))))
    if config.sparsity is not None:
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


def overridden(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """`config` with the flags that were given. Raises ConfigError for an unknown key or a value that does not fit."""
    settings = config.to_dict()
    given = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in options.flags}
    if given.get("--flops-reduction") is None and any(given.get(flag) for flag in _OTHER_TARGETS):
        _assign(settings, "prune.flops_reduction", 0)  # the recipe's is no target beside the one that is given
    for flag, value in given.items():
        key = options.flags[flag][0]
        if value is not None:
            _assign(settings, key, value.split(",") if key == "prune.criteria" else value)
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment!r} has no '=': write --set KEY=VALUE, such as --set prune.step=0.02")
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a bare word is a string
        _assign(settings, current_name(key, RENAMED_KEYS), value)
    config = RunConfig.from_dict(settings)
    if config.sparsity is not None and given.get("--flops-reduction") is not None:
        raise ConfigError(
            f"--flops-reduction is {given['--flops-reduction']:g}, but {config.name} makes groups sparse and removes "
            "no filters: leave it out, or add --set sparsity=null (with 0 the network is only trained then)"
        )
    # Ray workers and jobs change their working directory: what was meant relative to here must say so.
    return dataclasses.replace(
        config,
        storage=_absolute_storage(config.storage),
        data=dataclasses.replace(config.data, path=_absolute(config.data.path, "--data")),
        train=dataclasses.replace(config.train, pretrained=_absolute_weights(config.train.pretrained)),
        sparsity=config.sparsity
        and dataclasses.replace(config.sparsity, from_run=_absolute(config.sparsity.from_run, "sparsity.from_run")),
    )


def _assign(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(settings.get(parent), dict):
            raise ConfigError(
                f"unknown config key {key}: {parent!r} is no section; sections: "
                + ", ".join(sorted(name for name, item in settings.items() if isinstance(item, dict)))
            )
        settings = settings[parent]
    settings[last] = value


def _absolute(path: str | None, named: str = "data.path") -> str | None:
    if path is None or "://" in path:
        return path
    if not path.strip():  # which would be the current folder
        raise ConfigError(f"{named} is empty: name a path, or leave it out")
    return str(_expanded(path, named).absolute())


def _expanded(path: str, named: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{named} {path!r}: there is no such user's home here; write the path out") from error


def _absolute_weights(source: str | None) -> str | None:
    return (
        source
        if source is not None and source.startswith(models.TORCHVISION)
        else _absolute(source, "train.pretrained")
    )


def _absolute_storage(storage: str) -> str:
    """A submitted job's working directory is a folder of Ray's that is removed some day: no place for a run."""
    if storage == "" or "://" in storage:
        return storage
    path = _expanded(storage, "storage")
    if path.is_absolute() or JOB_VARIABLE not in os.environ:
        return str(path.absolute())
    kept = str(Path.home() / "laasp_ray" / path)
    print(
        f"This is a submitted job: runs are kept in {kept} on its driver's node; give --storage a shared path or s3://.",
        file=sys.stderr,
    )
    return kept


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, must be at least 1")
    return number


def _guarded(run: Callable[[], None], stopped: str = "stopped; the same command goes on with the run") -> int:
    """Runs it; gives the exit status. What it raises on purpose, and being stopped, is one line on standard error."""
    _replace_what_cannot_be_printed()
    try:
        with _sigterm_as_interrupt() as received:
            run()
    except (ConfigError, DataError, StoreError) as error:
        return _ended(f"error: {error}", 2)
    except LaaspError as error:
        return _ended(f"error: {type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _ended(stopped, 128 + (received[0] if received else signal.SIGINT))
    return 0


def _ended(line: str, status: int) -> int:
    print(public_text(line), file=sys.stderr)
    return status


def _replace_what_cannot_be_printed() -> None:
    """A terminal's encoding may lack a character of a name: it is printed as '?', and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM is raised as a KeyboardInterrupt, the one exception of a signal's that Ray's C++ core lets through; the
    list then holds its number."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def raise_it(number: int, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what was started is being stopped
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
