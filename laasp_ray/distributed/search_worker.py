"""The search worker: an actor on one device that keeps the network and the images between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from laasp_ray.distributed.places import Place, this_place
from laasp_ray.distributed.process import PROCESS, device, enter_device
from laasp_ray.distributed.versions import check_versions


class SearchWorker:
    """Carries out calls, one after the other, on the device that Ray assigned to it.

    The functions of executor.py and importance.py keep the unpruned network, the calibration set and the iteration's
    network in `process.PROCESS` between calls.
    """

    def __init__(self, versions: Mapping[str, str]) -> None:
        """`versions` are the driver's."""
        self._versions = versions

    def place(self) -> Place:
        """The worker's place. Raises ConfigError if its node has other versions than the driver, or a GPU that torch
        cannot use.
        """
        check_versions(self._versions)
        return this_place(str(enter_device()))

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Calls the function. Ray does not fetch references inside a list argument; the function does, once."""
        return function(*arguments)

    def rest(self) -> None:
        """Frees the iteration's network and torch's cached memory, because the trainers share this device."""
        PROCESS.forget_iteration()
        if device().type == "cuda":
            torch.cuda.empty_cache()
