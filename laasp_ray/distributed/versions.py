"""Checks that a node of the cluster has the versions of the driver: other ones give other numbers, or errors later."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import ray

from laasp_ray.errors import ConfigError

_PACKAGES = ("laasp_ray", "torch", "torchvision")


def installed() -> dict[str, str]:
    """Package -> version in this process; Python's too."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder on the path
            found[package] = "not installed"
    return found


def check_versions(drivers: Mapping[str, str]) -> None:
    """Raises ConfigError if this process has other versions than the driver's, naming this node."""
    here = installed()
    other = [f"{name} {here[name]} (the driver: {theirs})" for name, theirs in drivers.items() if here[name] != theirs]
    if other:
        raise ConfigError(
            f"node {ray.util.get_node_ip_address()} has {', '.join(other)}: install the same versions on all nodes, or "
            "start them from one image"
        )
