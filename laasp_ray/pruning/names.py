"""The modules of a network that a config names: ignored modules and extra candidates."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from laasp_ray.config.names import did_you_mean
from laasp_ray.errors import ConfigError


def ignored_modules(modules: Sequence[str], ignored: Sequence[str]) -> set[str]:
    """The modules named by the entries of `ignored`, with all their submodules. An entry may be a prefix that ends in a
    dot.

    Raises ConfigError for an entry that names nothing.
    """
    frozen: set[str] = set()
    for entry in ignored:
        prefix = entry if entry.endswith(".") else entry + "."
        found = {name for name in modules if name.startswith(prefix) or name == entry} if entry else set()
        if not found:
            raise ConfigError(
                f"prune.ignored names {entry!r}, which is no module of the network{_hint(entry.rstrip('.'), modules)}"
            )
        frozen |= found
    return frozen


def candidate_layers(modules: Mapping[str, nn.Module], extra_layers: Sequence[str]) -> list[str]:
    """The convolutions and the `extra_layers`, in network order. An entry with a star stands for all linear layers that
    fit.

    Raises ConfigError for an entry that is not a linear layer, or fits none.
    """
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    extra: set[str] = set()
    for entry in extra_layers:
        found = fnmatch.filter(linear, entry) if "*" in entry else [name for name in linear if name == entry]
        if not found:
            raise ConfigError(
                f"prune.extra_layers names {entry!r}, which is no linear layer of the network{_hint(entry, linear)}"
            )
        extra.update(found)
    return [name for name, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd) or name in extra]


def _hint(name: str, known: Sequence[str]) -> str:
    near = did_you_mean(name, known, most=3)
    return f"; {near}" if near else ""
