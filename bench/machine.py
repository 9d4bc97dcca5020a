"""What a benchmark ran on, in one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def machine(*packages: str) -> str:
    """The processor, the GPU, torch's threads and the versions of `packages`, where they are installed."""
    versions = []
    for package in ("torch", "torchvision", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{processor()}, {os.cpu_count()} CPUs, {gpu}, torch threads: {torch.get_num_threads()}; {platform.system()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
