"""README, docs/, CONTRIBUTING: links and anchors resolve; flags, keys, files and tests that are named exist."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from laasp_ray import config
from laasp_ray.cli import main
from laasp_ray.cli.export import export
from laasp_ray.cli.prepare_data import prepare_data
from laasp_ray.cli.report import report
from laasp_ray.cli.sweep import sweep
from laasp_ray.config import RunConfig
from laasp_ray.config.compat import RESUMABLE_KEYS
from laasp_ray.config.fields import flatten
from laasp_ray.config.names import is_import_path
from laasp_ray.recipes import RECIPES, recipe

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
JOBS = {
    "prune_resnet50": main.prune_resnet50,
    "prune": main.prune,
    "sparsify": main.sparsify,
    "evaluate": main.evaluate,
    "export": export,
    "status": main.status,
    "report": report,
    "prepare_data": prepare_data,
    "sweep_flops": sweep,
}
OTHERS_FLAGS = {"--working-dir", "--head"}
"""Flags of Ray's own commands."""
FILE_TYPES = {"json", "md", "onnx", "parquet", "png", "py", "safetensors"}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    return [text for named, text in FENCE.findall(page.read_text()) if named == language]


def code(page: Path) -> Iterator[str]:
    """Inline code, and the lines of fenced blocks; what a line break cut is joined."""
    for span in CODE.findall(prose(page)):
        yield " ".join(span.split())
    for _, text in FENCE.findall(page.read_text()):
        yield from text.splitlines()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs both make them: any heading on which the two differ is none."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        github, mkdocs = text.replace(" ", "-"), re.sub(r"[-\s]+", "-", text)
        if github == mkdocs:
            found.add(github)
    return found


@functools.cache
def flags_of(job: str) -> frozenset[str]:
    """The flags that a job's own --help lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        JOBS[job](["--help"])
    return frozenset(FLAG.findall(printed.getvalue()))


@functools.cache
def keys() -> frozenset[str]:
    """Every dotted key that a config may have: those of the recipes, and the fields of every section's class.

    A class that is named after no field of RunConfig is a method's: its section is `prune`.
    """
    found = {key for name in RECIPES for key in flatten(recipe(name).to_dict())}
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    for module in pkgutil.iter_modules(config.__path__, f"{config.__name__}."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if name.endswith("Config") and dataclasses.is_dataclass(kind) and kind is not RunConfig:
                section = name.removesuffix("Config").lower()
                prefix = section if section in sections else "prune"
                found |= {f"{prefix}.{field.name}" for field in dataclasses.fields(kind)}
    return frozenset(found)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The scripts of jobs/ and bench/ that a page runs, each with its arguments."""
    for text in code(page):
        for script, arguments in re.findall(r"python ((?:jobs|bench)/\w+\.py)([^#\n]*)", text):
            yield script, arguments.split()


@by_page
def test_links_and_anchors_resolve(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_of_docs_is_in_the_navigation_and_in_the_readme():
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w-]+\.md", str(entries))
    assert sorted(listed) == [page.name for page in PAGES if page.parent == ROOT / "docs"]
    assert set(re.findall(r"docs/([\w-]+\.md)", (ROOT / "README.md").read_text())) == set(listed)


def test_the_readme_is_short_and_begins_with_its_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []
    first = next(number for number, line in enumerate(lines) if line.startswith("make "))
    assert first <= 25
    assert [line.split("#")[0].split() for line in lines[first : first + 2]] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]


def test_prose_is_no_wider_than_120_characters():
    lines = [(page.name, line) for page in PAGES for line in prose(page).splitlines() if page.name != "options.md"]
    assert [(name, line) for name, line in lines if len(line) > 120 and not line.startswith("|")] == []


@by_page
def test_flags_that_are_named_exist(page):
    known = OTHERS_FLAGS.union(*map(flags_of, JOBS))
    in_commands = [flag for script, given in commands(page) if script.startswith("bench") for flag in given]
    named = {flag for text in code(page) for flag in FLAG.findall(text)}
    bench = "".join(path.read_text() for folder in ("bench", "cluster") for path in (ROOT / folder).glob("*.py"))
    of_bench = {flag for flag in (*in_commands, *named) if f'"{flag}"' in bench and page.name != "README.md"}
    assert named - known - of_bench == set()


@by_page
def test_commands_have_flags_that_their_script_knows_and_recipes_that_there_are(page):
    for script, given in commands(page):
        assert (ROOT / script).is_file(), script
        flags = {argument for argument in given if FLAG.fullmatch(argument)}
        if script.startswith("bench"):
            unknown = {flag for flag in flags if f'"{flag}"' not in (ROOT / script).read_text()}
        else:
            job = script.removeprefix("jobs/").removesuffix(".py")
            unknown = flags - flags_of(job)
            if job in ("prune", "sparsify") and given:
                assert given[0] in RECIPES or given[0] == "RECIPE" or is_import_path(given[0]), (script, given)
        assert unknown == set(), (script, given)


@by_page
def test_config_keys_that_are_named_exist(page):
    sections = {key.partition(".")[0] for key in keys() if "." in key}
    named = re.compile(rf"(?<![\w.:/])((?:{'|'.join(sorted(sections))})\.[a-z_]+(?:\.[a-z_]+)*)\b(?![\w(])")
    found = {key for text in code(page) for key in named.findall(text)}
    assert {key for key in found - keys() if key.rpartition(".")[2] not in FILE_TYPES} == set()


@by_page
def test_files_tests_and_make_targets_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pytests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for text in code(page):
        for path in re.findall(r"\b((?:laasp_ray|tests|bench|jobs|docs)/[\w/]+\.(?:py|md|json))\b", text):
            assert (ROOT / path).is_file(), path
        for name in re.findall(r"(?<![.\w])(test_\w+)\b(?!\.py)", text):
            assert f"def {name}(" in pytests, name
        for target in re.findall(r"(?:^|`| )make (?:PYTHON=\S+ )?([a-z]+(?:-[a-z]+)*)\b", text):
            assert target in targets, text


@by_page
def test_python_examples_are_python_and_import_what_there_is(page):
    for example in blocks(page, "python"):
        for node in ast.parse(example).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "laasp_ray":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_readme_s_first_example_runs(capsys):
    example = blocks(ROOT / "README.md", "python")[0]
    assert len(example.splitlines()) <= 10
    names: dict[str, object] = {}
    exec(example, names)
    layer, criterion = capsys.readouterr().out.split()[:2]
    assert layer in dict(names["network"].named_modules()) and criterion in ("l1", "cosine")
    assert names["best"].loss == min(entry.loss for entry in names["ranking"])


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe_lines = re.search(r"^lint:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)[1].splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe_lines]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_continuous_integration_calls_the_readme_s_test_command():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["check"]["steps"]]
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_what_may_change_when_a_run_is_resumed_is_listed():
    page = (ROOT / "docs" / "faults.md").read_text()
    section = page.partition("## What may change when a run is resumed")[2].partition("\n## ")[0]
    listed = {name.removesuffix(".*") for name in re.findall(r"`([a-z_.]+(?:\.\*)?)`", section)}
    assert listed == set(RESUMABLE_KEYS)
