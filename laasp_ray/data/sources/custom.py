"""A user's own data set, opened by the class or function that the import path in `data.format` names."""

from __future__ import annotations

from typing import Any

import numpy as np

from laasp_ray.config import DataConfig
from laasp_ray.config.names import imported
from laasp_ray.data.sources.base import ImageSource, Split, check_labels
from laasp_ray.errors import ConfigError, LaaspError


def open_custom(config: DataConfig, split: Split) -> ImageSource:
    """Calls the class or function that `data.format` names with the config and the split, and checks the result.

    Raises ConfigError if it cannot be imported, fails, or does not return an ImageSource; raises DataError as
    `check_labels` does. An OSError is not converted, because it comes from the storage.
    """
    where = f"data.format {config.format!r}"
    opener = imported(config.format, "data.format")
    try:
        source = opener(config, split)
    except (LaaspError, OSError):
        raise
    except Exception as error:  # a user's code can raise any error
        raise ConfigError(f"{where} failed to open the {split} images: {type(error).__name__}: {error}") from error
    wrong = _lacking(source)
    if wrong:
        raise ConfigError(
            f"{where} gave a {type(source).__name__} for the {split} images that is no ImageSource "
            f"(data/sources/base.py): {wrong}"
        )
    check_labels(source.labels, source.classes, split=split, where=f"the {split} split of {where}")
    return source


def _lacking(source: object) -> str:
    """The reason why an object is not an ImageSource; empty if it is one."""
    for method in ("__len__", "read", "name"):
        if not callable(getattr(source, method, None)):
            return f"it has no method {method}"
    labels: Any = getattr(source, "labels", None)
    classes = getattr(source, "classes", None)
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
        is_array = isinstance(labels, np.ndarray)
        given = f"{labels.dtype} of shape {labels.shape}" if is_array else type(labels).__name__
        return f"its labels are {given}, must be a numpy array of int64 of shape (n,)"
    if not isinstance(classes, tuple) or not all(isinstance(name, str) for name in classes):
        return f"its classes are {str(classes)[:60]}, must be a tuple of strings"
    if len(set(classes)) < len(classes):
        return "two of its classes have the same name"
    if len(source) != len(labels):  # type: ignore[arg-type]
        return f"its length is {len(source)}, and it has {len(labels)} labels"  # type: ignore[arg-type]
    return ""
