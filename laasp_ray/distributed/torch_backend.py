"""Ray Train's process group for torch, on the network interface that Ray itself uses."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from laasp_ray.errors import ConfigError
from laasp_ray.models.device import unusable


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_check_gpu)
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeTorchConfig(TorchConfig):
    """TorchConfig for hosts whose name leads to the loopback address, as it does on Debian: Gloo would listen there,
    where ranks on other hosts cannot reach it.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


def _check_gpu() -> None:
    """Raises ConfigError if Ray gave this trainer a GPU that torch cannot use. It would train on the CPU otherwise."""
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        raise ConfigError(f"node {ray.util.get_node_ip_address()}: {unusable()}")


def _choose_interface() -> None:
    """Names the interface of this node's address for Gloo, unless the user has named one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family in (socket.AF_INET, socket.AF_INET6) and one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
