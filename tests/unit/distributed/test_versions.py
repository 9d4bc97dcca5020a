"""A node with other versions than the driver's is named, with what differs."""

from types import SimpleNamespace

import pytest
import torch

from laasp_ray.distributed import versions
from laasp_ray.errors import ConfigError


def test_the_same_versions_pass():
    here = versions.installed()
    assert here["torch"] == torch.__version__.partition("+")[0] or here["torch"] == torch.__version__
    assert set(here) == {"Python", "laasp_ray", "torch", "torchvision"}
    versions.check_versions(here)


def test_other_versions_are_named_with_the_node_and_the_remedy(monkeypatch):
    monkeypatch.setattr(versions, "ray", SimpleNamespace(util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7")))
    monkeypatch.setattr(versions, "version", {"laasp_ray": "0.3", "torch": "2.14.0", "torchvision": "0.29.2"}.get)
    drivers = {"Python": versions.installed()["Python"], "laasp_ray": "0.3", "torch": "2.15.0", "torchvision": "0.29.2"}
    with pytest.raises(
        ConfigError, match=r"node 10\.0\.0\.7 has torch 2\.14\.0 \(the driver: 2\.15\.0\): install the same versions"
    ):
        versions.check_versions(drivers)
