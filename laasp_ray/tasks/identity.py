"""What identifies a Python object in the journal, so that a resumed run can refuse another one."""

from __future__ import annotations

import functools
import hashlib
import importlib
import types
from collections.abc import Mapping
from typing import Any

import torch

from laasp_ray.data.examples.nested import digest_of


def identity_of(value: Any) -> str:
    """The import path of a function or class that can be imported, so that its code may be repaired between two starts;
    of anything else the path of its type or code with a digest of what it holds. Equal objects have equal identities in
    every process.
    """
    if value is None:
        return "none"
    path = _path_of(value)
    return (
        path
        if path is not None
        else f"{_label_of(value)} {hashlib.sha256(_described(value, 0).encode()).hexdigest()[:16]}"
    )


def _path_of(value: Any) -> str | None:
    """The import path of `value`, if it leads back to it. A script's own objects have none: `__main__` changes."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return f"{module}:{name}" if found is value else None


def _label_of(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def _described(value: Any, depth: int) -> str:
    """A text that is equal for equal values: code by its instructions, objects by their fields."""
    path = _path_of(value) if callable(value) else None
    if path is not None:
        return path
    if depth > 8:  # a structure that contains itself
        return type(value).__qualname__

    def inner(part: Any) -> str:
        return _described(part, depth + 1)

    if isinstance(value, types.CodeType):
        consts = [inner(const) for const in value.co_consts]
        return f"code {value.co_code.hex()} {value.co_names} {consts}"
    if isinstance(value, types.FunctionType):
        cells = [inner(cell.cell_contents) for cell in value.__closure__ or ()]
        return f"function {inner(value.__code__)} {inner(value.__defaults__)} {inner(value.__kwdefaults__)} {cells}"
    if isinstance(value, types.MethodType):
        return f"method {value.__name__} of {inner(value.__self__)}"
    if isinstance(value, functools.partial):
        return f"partial {inner(value.func)} {inner(value.args)} {inner(value.keywords)}"
    if isinstance(value, Mapping):
        return f"mapping {[(repr(key), inner(item)) for key, item in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"sequence {[inner(item) for item in value]}"
    if isinstance(value, type):
        members = {name: part for name, part in vars(value).items() if isinstance(part, types.FunctionType)}
        return f"class {value.__qualname__} {inner(members)}"
    fields = getattr(value, "__dict__", None)
    if fields is not None and not isinstance(value, torch.Tensor) and not hasattr(value, "tobytes"):
        return f"object {inner(type(value))} {inner(dict(sorted(fields.items())))}"
    try:
        return digest_of(value)
    except Exception:  # what cannot be pickled is known by its type
        return type(value).__qualname__
