"""What a run is carried out on, in words."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def this_machine() -> dict[str, str]:
    """The machine and the software of this process: `driver` and `software`."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    devices = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    versions = f"laasp_ray {_version('laasp_ray')}, torch {torch.__version__}, Python {platform.python_version()}"
    return {"driver": f"{processor()}, {os.cpu_count()} CPUs, {devices}", "software": versions}


def processor() -> str:
    """The processor's name where the system gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a working directory that was sent to a cluster is not installed
        return "not installed"
