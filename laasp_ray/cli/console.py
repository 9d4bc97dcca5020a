"""The console script `laasp-ray`. Each subcommand takes the same arguments as the script of that name in jobs/."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import laasp_ray

COMMANDS = {
    "prune": "prune a network while it trains, by a recipe",
    "sparsify": "make a network's weights sparse in groups, and train it on",
    "evaluate": "measure a run's pruned and unpruned network",
    "export": "export the network of a finished run, and check it",
    "sweep": "prune to several targets, or as far as a drop allows",
    "status": "say what a run is doing, or list all runs of a folder",
    "report": "write a run's or a sweep's page, or one of several runs side by side",
    "prepare-data": "make shards from a data set, and check every image",
}
"""Subcommand -> its description."""
_OWN_MODULE = ("export", "prepare-data", "report", "sweep")
"""The subcommands that are modules of their own."""


def command(name: str) -> Callable[..., int]:
    """The function that carries out a subcommand."""
    function = name.replace("-", "_")
    module = function if name in _OWN_MODULE else "main"
    return getattr(importlib.import_module(f"laasp_ray.cli.{module}"), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `laasp-ray COMMAND ...` and returns the exit status of the command (see cli/stopping.py)."""
    listed = "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="laasp-ray",
        description=f"Prunes convolutional networks on a Ray cluster.\n\ncommands:\n{listed}",
        epilog="laasp-ray COMMAND --help lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"laasp-ray {laasp_ray.__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND", help="one of the commands above")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given[:1])  # the command parses the remaining arguments itself
    # The import takes seconds, and --version does not need it.
    return command(options.command)(given[1:], prog=f"laasp-ray {options.command}")
