"""Imports run one way, and Ray, torch-pruning, DALI and pyarrow each stay in their room."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = [
    {"errors"},
    {"records"},
    {"config"},
    {"models", "recipes"},
    {"cost", "criteria", "data"},
    {"tasks"},
    {"pruning"},
    {"export", "store"},
    {"search", "train"},
    {"methods"},
    {"run"},
    {"report"},
    {"distributed"},
    {"planning"},
    {"api"},
    {"sweep"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SAME_LEVEL_ALLOWED: set[tuple[str, str]] = set()
AT_THE_ROOT = {"__init__.py", "api.py", "errors.py", "records.py"}
QUARANTINE = {
    "ray": ("distributed/", "api.py", "cli/main.py"),
    "torch_pruning": (),
    "nvidia": ("data/loaders/dali.py",),
    "pyarrow": ("store/", "data/"),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def sources() -> list[Path]:
    return sorted(
        path
        for path in (ROOT / "laasp_ray").rglob("*.py")
        if path.name != "__init__.py" or path.parent != ROOT / "laasp_ray"
    )


def test_every_room_has_a_level():
    rooms = {path.relative_to(ROOT / "laasp_ray").parts[0].removesuffix(".py") for path in sources()}
    assert rooms == set(LEVEL)


def test_no_file_is_added_at_the_root():
    assert {path.name for path in (ROOT / "laasp_ray").glob("*.py")} == AT_THE_ROOT


def test_imports_run_one_way():
    wrong = []
    for path in sources():
        here = path.relative_to(ROOT / "laasp_ray").parts[0].removesuffix(".py")
        for module, line in imports(path):
            if not module.startswith("laasp_ray."):
                continue
            there = module.split(".")[1]
            if there not in LEVEL or there == here or (here, there) in SAME_LEVEL_ALLOWED:
                continue
            if LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_in_their_rooms():
    wrong = []
    for path in sources():
        here = path.relative_to(ROOT / "laasp_ray").as_posix()
        for module, line in imports(path):
            allowed = QUARANTINE.get(module.split(".")[0])
            if allowed is not None and not here.startswith(allowed):
                wrong.append(f"{here}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_nothing_depends_on_the_shared_folder():
    # The folder of development data is none of the product's.
    found = [path for path in sources() if "shared/" in path.read_text()]
    assert not found
