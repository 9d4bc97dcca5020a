"""Networks by name, and weights from files."""

from __future__ import annotations

from laasp_ray.models.registry import TORCHVISION, build, build_offline, known_builders, load_pretrained, load_weights

__all__ = ["TORCHVISION", "build", "build_offline", "known_builders", "load_pretrained", "load_weights"]
