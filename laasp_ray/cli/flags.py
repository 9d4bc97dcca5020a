"""Flags, and how they change a recipe's config. The help of a flag is the Doc of its config key."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laasp_ray import models
from laasp_ray.config import FilterPruneConfig, GroupSparsityConfig, LaaspConfig, PruneConfig, RunConfig
from laasp_ray.config.compat import RENAMED_KEYS, current_name
from laasp_ray.config.methods import keys_of, with_method
from laasp_ray.config.run import doc_of_key
from laasp_ray.errors import ConfigError
from laasp_ray.methods import PruningMethod
from laasp_ray.methods.group_sparsity import GroupSparsity
from laasp_ray.methods.registry import BUILT_IN
from laasp_ray.recipes import RECIPES, VARIANT_NAMES, for_trained_network, with_variant

logger = logging.getLogger(__name__)

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable that Ray sets for the drivers of submitted jobs."""


@dataclass(frozen=True)
class Flag:
    """The config key that a flag sets, the parser of its text, and what its help adds to the key's Doc.

    The flag is only for methods whose section is an instance of `only`.
    """

    key: str
    kind: Callable[[str], Any] = str
    more: str = ""
    only: type[PruneConfig] = PruneConfig

    @property
    def help(self) -> str:
        return "; ".join(text for text in (doc_of_key(self.key), self.more) if text) + f" [{self.key}]"


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
    "--criteria": Flag("prune.criteria", _words, f"{COMMA}; of method laasp"),
    "--compensate": Flag("prune.compensate"),
    "--method": Flag("prune.method", only=FilterPruneConfig),
    "--iterations": Flag("prune.iterations", int),
    "--percent": Flag("prune.percent", float, "of method pls"),
    "--components": Flag("prune.components", int),
    "--pooling": Flag("prune.pooling"),
    "--group": Flag("prune.group", int),
    "--prune": Flag("prune.pruned_per_group", int),
    "--fc-prune": Flag("prune.fc_pruned_per_group", _numbers, COMMA),
    "--stages": Flag("prune.stages", _numbers, COMMA),
    "--epochs-per-stage": Flag("prune.fine_tune_epochs", int, only=GroupSparsityConfig),
    "--from-run": Flag("prune.from_run"),
    "--workers": Flag("cluster.workers", int),
    "--export": Flag("export.format"),
    "--seed": Flag("seed", int),
}
"""All flags. A command takes those that its methods can use."""

_RENAMED_FLAGS = {"--loss-images": "--calibration-images"}
_FLOPS = "--flops-reduction"
_OTHER_TARGETS = ("--parameters-reduction", "--latency-reduction")


def flags_of(*methods: type[PruningMethod[Any]]) -> Flags:
    """The flags whose keys at least one of these methods uses."""

    def is_used(flag: Flag, method: type[PruningMethod[Any]]) -> bool:
        section, _, name = flag.key.partition(".")
        if section == "prune":
            return name in keys_of(method.config_class) and issubclass(method.config_class, flag.only)
        return method.measures_losses or section != "search"

    return {name: flag for name, flag in FLAGS.items() if any(is_used(flag, method) for method in methods)}


FILTER_FLAGS = flags_of(*(method for method in BUILT_IN.values() if issubclass(method.config_class, FilterPruneConfig)))
SPARSITY_FLAGS = flags_of(GroupSparsity)


def at_least_1(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, must be at least 1")
    return number


def run_parser(prog: str, description: str, flags: Flags = FILTER_FLAGS) -> argparse.ArgumentParser:
    """The parser of a command that starts a run: one flag for each of `flags`, and the flags that say how to run."""
    # With abbreviations jobs/prune.py would read --prune, a flag of jobs/sparsify.py, as --prune-epoch.
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
    if flags is not SPARSITY_FLAGS:
        parser.add_argument(
            "--variant",
            help=f"another setting of the recipe: {', '.join(VARIANT_NAMES)} (default: with --pretrained compensated)",
        )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and how long it would take")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


class _Renamed(argparse.Action):
    """A flag name of an earlier version. Its value is used, and a log line gives the new name."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        current_name(option_string or "", _RENAMED_FLAGS)
        setattr(namespace, self.dest, values)


def of_variant(config: RunConfig, name: str, options: argparse.Namespace) -> RunConfig:
    """The recipe called `name` in the variant that is asked for.

    If none is, a built-in recipe that trains from scratch gets compensation where the flags begin it with weights and
    do not say otherwise. Raises ConfigError for a variant that the recipe does not have.
    """
    if options.variant is not None:
        return with_variant(config, name, options.variant)
    assigned = _assigned(options)
    begins = assigned.get("train.pretrained") is not None and config.train.pretrained is None
    by_laasp = assigned.get("prune.method", LaaspConfig.method) == LaaspConfig.method
    if name not in RECIPES or not begins or not by_laasp or assigned.get("prune.compensate") == "off":
        return config
    compensated = for_trained_network(config)
    if compensated != config:
        logger.info("the run begins with trained weights: prunes are compensated; --variant paper leaves that out")
    return compensated


def _assigned(options: argparse.Namespace) -> dict[str, Any]:
    """Config key -> value, of all flags that are given."""
    given = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in options.flags}
    assigned = {options.flags[flag].key: value for flag, value in given.items() if value is not None}
    return assigned | dict(_assignment(text) for text in options.set)


def overridden(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """`config` changed by the given flags. Raises ConfigError for an unknown key or a value that does not fit.

    If the method changes, the section `prune` becomes the new method's section. Keys that both sections have are kept.
    """
    settings = config.to_dict()
    assigned = _assigned(options)
    method = assigned.pop("prune.method", settings["prune"]["method"])
    if method != settings["prune"]["method"] and isinstance(method, str):
        settings["prune"] = with_method(settings["prune"], method)
    settings["prune"]["method"] = method
    flags = options.flags
    given = {name: getattr(options, name[2:].replace("-", "_")) for name in (_FLOPS, *_OTHER_TARGETS) if name in flags}
    other = given.get(_FLOPS) is None and any(given.get(name) for name in _OTHER_TARGETS)
    if other and "flops_reduction" in settings["prune"]:
        settings["prune"]["flops_reduction"] = 0  # the recipe's is no target beside the one that is given
    for key, value in assigned.items():
        _assign(settings, key, value)
    config = RunConfig.from_dict(settings)
    prune = config.prune
    if isinstance(prune, GroupSparsityConfig):
        prune = dataclasses.replace(prune, from_run=absolute(prune.from_run, "prune.from_run"))
    # Ray workers and jobs change their working directory, so relative paths become absolute here.
    return dataclasses.replace(
        config,
        storage=_absolute_storage(config.storage),
        data=dataclasses.replace(config.data, path=absolute(config.data.path, "--data")),
        train=dataclasses.replace(config.train, pretrained=_absolute_weights(config.train.pretrained)),
        prune=prune,
    )


def sets_key(options: argparse.Namespace, key: str) -> bool:
    """Whether the user sets this key, or one below it, with --set."""
    keys = [_assignment(text)[0] for text in options.set]
    return any(given == key or given.startswith(f"{key}.") for given in keys)


def _assignment(text: str) -> tuple[str, Any]:
    """The current name of the key and the value of `--set KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} has no '=': write --set KEY=VALUE, such as --set prune.step=0.02")
    try:
        return current_name(key, RENAMED_KEYS), json.loads(value)
    except ValueError:
        return current_name(key, RENAMED_KEYS), value  # a bare word is a string


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
    """The absolute path, relative to the current folder; an address is unchanged. A ConfigError calls it `named`."""
    if path is None or "://" in path:
        return path
    if not path.strip():  # an empty path would mean the current folder
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
    """The absolute storage path; an address is unchanged.

    In a submitted job a relative path is put under the home folder, because Ray later removes the job's working
    directory.
    """
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
