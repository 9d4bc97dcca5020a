"""The packages that ONNX needs: the extra `export`."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from laasp_ray.config import ExportConfig
from laasp_ray.errors import ConfigError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
REMEDY = "pip install 'laasp_ray[export]'"


def missing() -> tuple[str, ...]:
    """The packages that are not installed. None is imported."""
    return tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def versions() -> dict[str, str]:
    """Package -> its version, of torch and of the installed ones."""
    distributions = metadata.packages_distributions()  # onnxruntime's is called onnxruntime-gpu where it is for GPUs
    return {
        name: metadata.version(distributions[name][0])
        for name in ("torch", *PACKAGES)
        if name not in missing() and distributions.get(name)
    }


def check_export(config: ExportConfig) -> None:
    """Raises ConfigError if the format that is asked for needs packages that are not installed."""
    absent = missing()
    if config.format == "onnx" and absent:
        raise ConfigError(
            f"export.format is 'onnx', which needs {', '.join(absent)}: {REMEDY}, or give --export torch or none"
        )
