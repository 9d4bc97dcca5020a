"""bench/gpu.py, the machine: whether torch can use its GPU, and the ceilings that other figures are read against."""

from __future__ import annotations

import argparse
import functools
import os

import torch
from gpu_results import Rows
from machine import machine
from reference import synchronise
from timing import seconds_of

from laasp_ray.models.device import gpus_here, this_device


def look(options: argparse.Namespace, rows: Rows) -> None:
    """Raises SystemExit if the device that is asked for cannot be used."""
    device = this_device()  # its error says what torch lacks
    if options.device == "cuda" and device.type != "cuda":
        raise SystemExit("error: no NVIDIA GPU is to be seen here; --device cpu rehearses this at toy size")
    rows.add("machine", {"description": machine("ray", "nvidia-dali-cuda130"), "CPUs": usable_cpus()}, True)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        rows.add(
            "GPU",
            {
                "name": torch.cuda.get_device_name(),
                "capability": f"{major}.{minor}",
                "memory GB": torch.cuda.mem_get_info()[1] / 1e9,
                "free GB": torch.cuda.mem_get_info()[0] / 1e9,
                "CUDA of torch": torch.version.cuda,
                "cuDNN": torch.backends.cudnn.version(),
                "GPUs": len(gpus_here()),
            },
            True,
        )
    size = 256 if options.toy else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float32", torch.float32, "ieee"),
        ("float32 as TF32", torch.float32, "tf32"),
    ):
        with rows.trying(f"matrix product, {name}"):
            torch.backends.cuda.matmul.fp32_precision = precision
            one = torch.randn(size, size, device=device).to(dtype)
            wait = functools.partial(synchronise, one)
            taken = seconds_of(functools.partial(torch.matmul, one, one), wait, repeats=5)
            rows.add(f"matrix product, {name}", {"size": size, "TFLOP/s": 2 * size**3 / taken / 1e12})
    with rows.trying("copy"):
        source = torch.randn((1 << 14 if options.toy else 1 << 29), device=device)
        target = torch.empty_like(source)
        taken = seconds_of(lambda: target.copy_(source), lambda: synchronise(source), repeats=5)
        rows.add("copy", {"GB": source.nbytes / 1e9, "GB/s read and written": 2 * source.nbytes / taken / 1e9})


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
