"""The precision that forward passes of training are computed in (`train.precision`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from laasp_ray.config.train import TrainPrecision


def is_bfloat16(precision: TrainPrecision, device: torch.device) -> bool:
    """Whether training on `device` is in bfloat16, and not in float32."""
    if device.type == "cuda":
        return precision != "float32"
    return precision == "bfloat16" or (precision == "auto" and cpu_has_bfloat16())


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16. Without them it is slower than float32."""
    found: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch's older versions
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(precision: TrainPrecision, device: torch.device) -> torch.autocast:
    """The context of a forward pass of training. Weights, their gradients and the optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16(precision, device))
