"""Which packages bench/gpu.py finds, which it misses, and wheels of a folder put on the path. Needs no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CORE = ("torch", "torchvision", "numpy", "scipy", "pydantic", "fvcore", "psutil", "pyarrow", "rich", "PIL")
"""What the package imports whatever is asked of it."""
DISTRIBUTIONS = {
    "PIL": "pillow",
    "nvidia.dali": "nvidia-dali-cuda130",
    "ray": "ray",
    "torch_pruning": "torch-pruning",
}
"""Import name -> its package, where they differ."""
EXTRAS = {"ray": ("train", "tune")}
NAMED = (*CORE, "laasp_ray", "ray", "nvidia.dali", "triton", "torch_pruning", "onnx", "onnxscript", "onnxruntime")


def install_wheels(folder: Path, target: Path) -> str:
    """Installs the wheels of `folder` into `target`, without a network. Returns the path to import them from.

    An installer and not an unpacker, because some wheels bring programs that must stay executable. Raises SystemExit
    with the installer's words if it fails.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"error: there is no wheel (*.whl) in {folder}")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the wheels of {folder} cannot be installed: {done.stderr.strip()[-2000:]}")
    return str(target)


def put_on_path(*folders: str) -> None:
    """Makes this process and those that it starts import from `folders` first."""
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def missing(names: Sequence[str]) -> list[str]:
    """Those of the import names that are not installed, and packages that an installed one needs and that are not."""
    found = []
    for name in names:
        if not _is_there(name):
            found.append(distribution_of(name))
        else:
            found += [f"{need} (for {name})" for need in needs_missing(distribution_of(name), EXTRAS.get(name, ()))]
    return list(dict.fromkeys(found))


def needs_missing(distribution: str, extras: Sequence[str] = ()) -> list[str]:
    """What an installed distribution requires, directly, and is not installed. Empty if that cannot be known."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires(distribution) or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    return [
        requirement.name
        for requirement in requirements
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        and version_of(requirement.name) is None
    ]


def versions() -> dict[str, str]:
    """Package -> version of what is installed of NAMED."""
    return dict(_versions())


def _versions() -> Iterator[tuple[str, str]]:
    for name in NAMED:
        distribution = distribution_of(name)
        version = version_of(distribution)
        if version is not None:
            yield distribution, version


def distribution_of(name: str) -> str:
    return DISTRIBUTIONS.get(name, name)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def outside_range(project: Path) -> list[str]:
    """Installed packages whose versions are outside of what pyproject.toml accepts."""
    if not project.is_file():
        return []
    import tomllib

    dependencies = tomllib.loads(project.read_text())["project"]["dependencies"]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return []
    found = []
    for requirement in map(Requirement, dependencies):
        name = re.sub(r"\[.*", "", requirement.name)
        version = version_of(name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{name} {version} (wanted {requirement.specifier})")
    return found


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
