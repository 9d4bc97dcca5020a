"""What a benchmark ran on, in one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

import torch

from laasp_ray.run.machine import processor


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
