"""Flags, and the config that they make of a recipe's. What a flag is for is in the docs of its key's field."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.config.compat import RENAMED_KEYS, current_name
from laasp_ray.config.fields import doc_of
from laasp_ray.errors import ConfigError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable that Ray sets for the drivers of submitted jobs."""


@dataclass(frozen=True)
class Flag:
    """The config key that a flag sets, how its text is read, and what its help adds to the key's own doc."""

    key: str
    kind: Callable[[str], Any] = str
    more: str = ""

    @property
    def help(self) -> str:
        return "; ".join(text for text in (doc_of(RunConfig, self.key), self.more) if text) + f" [{self.key}]"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


Flags = Mapping[str, Flag]
COMMA = "comma-separated"

FLAGS: Flags = {
    "--data": Flag("data.path"),
    "--storage": Flag("storage"),
    "--name": Flag("name"),
    "--flops-reduction": Flag("prune.flops_reduction", float, "without any target the network is only trained"),
    "--parameters-reduction": Flag(
        "prune.parameters_reduction", float, "without --flops-reduction there is no target for FLOPs then"
    ),
    "--latency-reduction": Flag("prune.latency_reduction", float, "here too the one for FLOPs is left out"),
    "--pretrained": Flag(
        "train.pretrained",
        str,
        "pruning comes first, training goes on at that epoch's learning rate; for a finished network give a late "
        "--prune-epoch",
    ),
    "--prune-epoch": Flag("train.prune_epoch", int),
    "--epochs": Flag("train.epochs", int),
    "--batch-size": Flag("train.batch_size", int, "that goes by --set train.learning_rate=..."),
    "--calibration-images": Flag("search.images", int),
    "--criteria": Flag("prune.criteria", _words, COMMA),
    "--method": Flag("prune.method"),
    "--iterations": Flag("prune.iterations", int),
    "--percent": Flag("prune.percent", float),
    "--components": Flag("prune.components", int),
    "--pooling": Flag("prune.pooling"),
    "--workers": Flag("cluster.workers", int),
    "--seed": Flag("seed", int),
}

_RENAMED_FLAGS = {"--loss-images": "--calibration-images"}
_OTHER_TARGETS = ("--parameters-reduction", "--latency-reduction")
_PLS_FLAGS = ("--method", "--iterations", "--percent", "--components", "--pooling")
_FILTER_FLAGS = ("--flops-reduction", *_OTHER_TARGETS, "--calibration-images", "--criteria", *_PLS_FLAGS)

SPARSITY_FLAGS: Flags = {
    "--group": Flag("sparsity.group", int),
    "--prune": Flag("sparsity.prune", int),
    "--fc-prune": Flag("sparsity.fc_prune", _numbers, COMMA),
    "--stages": Flag("sparsity.stages", _numbers, COMMA),
    "--epochs-per-stage": Flag("prune.fine_tune_epochs", int),
    "--from-run": Flag("sparsity.from_run"),
    **{flag: entry for flag, entry in FLAGS.items() if flag not in _FILTER_FLAGS},
}


def at_least_1(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, must be at least 1")
    return number


def run_parser(prog: str, description: str, flags: Flags = FLAGS) -> argparse.ArgumentParser:
    """The parser of a command that starts a run: a flag for each of `flags`, and how to run."""
    # Abbreviations would have jobs/prune.py take --prune, which jobs/sparsify.py has, for --prune-epoch.
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.set_defaults(flags=flags)
    for flag, entry in flags.items():
        parser.add_argument(flag, type=entry.kind, default=None, help=entry.help)
    for old, new in _RENAMED_FLAGS.items():
        if new in flags:
            parser.add_argument(
                old, type=flags[new].kind, dest=new[2:].replace("-", "_"), action=_Renamed, help=argparse.SUPPRESS
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
        type=at_least_1,
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


def overridden(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """`config` with the flags that were given. Raises ConfigError for an unknown key or a value that does not fit."""
    settings = config.to_dict()
    given = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in options.flags}
    if given.get("--flops-reduction") is None and any(given.get(flag) for flag in _OTHER_TARGETS):
        _assign(settings, "prune.flops_reduction", 0)  # the recipe's is no target beside the one that is given
    for flag, value in given.items():
        if value is not None:
            _assign(settings, options.flags[flag].key, value)
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
        data=dataclasses.replace(config.data, path=absolute(config.data.path, "--data")),
        train=dataclasses.replace(config.train, pretrained=_absolute_weights(config.train.pretrained)),
        sparsity=config.sparsity
        and dataclasses.replace(config.sparsity, from_run=absolute(config.sparsity.from_run, "sparsity.from_run")),
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


def absolute(path: str | None, named: str = "data.path") -> str | None:
    """The path as meant from here, or an address as it is; `named` is what a ConfigError calls it."""
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
        source if source is not None and source.startswith(models.TORCHVISION) else absolute(source, "train.pretrained")
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
