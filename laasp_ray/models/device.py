"""The device of a process, and copies to it that are not waited for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from laasp_ray.errors import ConfigError

_PROC, _DEV = Path("/proc/driver/nvidia/gpus"), Path("/dev")
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES with which a process has no GPU, whatever the machine has."""


def this_device() -> torch.device:
    """The GPU if torch can use one, the CPU if this process has none.

    Raises ConfigError, with torch's reason, if the machine has NVIDIA GPUs that torch cannot use (the driver is too old
    for the installed torch, or torch has no CUDA): hours on the CPU are not what the user wanted. With an empty
    CUDA_VISIBLE_DEVICES the CPU is wanted.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if gpus_here() and not hidden():
        raise ConfigError(
            f"{unusable()}; to compute on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing "
            "(CUDA_VISIBLE_DEVICES= in front of the command)"
        )
    return torch.device("cpu")


def unusable() -> str:
    """What to say about GPUs of this machine that torch cannot use: the versions, the reason and the remedy."""
    return (
        f"this machine has {len(gpus_here()) or 'no'} NVIDIA GPUs that its driver shows, but torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'not built in'}) cannot use one: {_reason()}. Install a driver that is new "
        "enough for this torch, or a torch that is built for this driver"
    )


def gpus_here() -> list[str]:
    """The NVIDIA GPUs that the driver shows on this machine, by the names of their files. Needs no CUDA."""
    shown = sorted(path.name for path in _PROC.iterdir()) if _PROC.is_dir() else []
    return shown or sorted(path.name for path in _DEV.glob("nvidia[0-9]*"))


def hidden() -> bool:
    """Whether the environment hides all GPUs from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises an AssertionError
        return " ".join(str(error).split())[:300].rstrip(".")
    return "torch.cuda.is_available() is False"


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`. A copy to a GPU is queued there and not waited for.

    A copy from memory that is not pinned waits for all work that is queued on the GPU.
    """
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
