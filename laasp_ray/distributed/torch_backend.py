"""Ray Train's process group for torch, on the network interface that Ray itself uses."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
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


def _choose_interface() -> None:
    """Names the interface of this node's address for Gloo, unless the user has named one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family in (socket.AF_INET, socket.AF_INET6) and one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
