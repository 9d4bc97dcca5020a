"""Restores a caller's process and network: the global random state, and the mode of every module."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the state of the global generators of torch (all devices), numpy and Python at the end."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode, and restores each module's own mode at the end. A frozen BatchNorm may have another mode than the
    network.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
