"""The modules of a network that a config names: ignored modules and extra candidates."""

from __future__ import annotations

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
    """The convolutions and the `extra_layers`, in network order. Raises ConfigError for an entry that is not a linear
    layer.
    """
    for name in extra_layers:
        if not isinstance(modules.get(name), nn.Linear):
            linear = [other for other, module in modules.items() if isinstance(module, nn.Linear)]
            raise ConfigError(
                f"prune.extra_layers names {name!r}, which is no linear layer of the network{_hint(name, linear)}"
            )
    return [
        name for name, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd) or name in extra_layers
    ]


def _hint(name: str, known: Sequence[str]) -> str:
    near = did_you_mean(name, known, most=3)
    return f"; {near}" if near else ""
