"""What cluster/README.md and the pages print: files that there are, tokens on both sides, dashboards on loopback."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from local_script import local
from manifests import complaints_of_the_crd, ray_document

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "cluster" / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose():
    return FENCE.sub("", README.read_text())


def test_files_that_are_named_exist_and_every_file_is_named():
    text = README.read_text()
    named = set(re.findall(r"\b(cluster/[\w/]+(?:\.\w+)?)", text)) - {"cluster"}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cluster").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files - named == {"cluster/README.md"}


def test_links_lead_to_its_headings_and_lines_are_short():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", prose(), re.MULTILINE)}
    headings = {re.sub(r"[^\w-]", "", heading) for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", prose())) <= headings
    assert [line for line in README.read_text().splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_flags_of_the_script_exist():
    printed = re.findall(r"python cluster/local\.py (up|down)([^`\n]*)", README.read_text())
    assert {action for action, _ in printed} == {"up", "down"}
    for action, given in printed:
        assert local.parse([action, *given.split()]).action == action


def test_what_it_says_of_rocksdb_is_what_the_operator_takes():
    (example,) = [text for language, text in FENCE.findall(README.read_text()) if language == "yaml"]
    cluster = ray_document("raycluster.yaml")
    cluster["spec"].update(yaml.safe_load(example))
    assert complaints_of_the_crd(cluster) == []


def tracked():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    skipped = ("LOG.md", "CHANGELOG.md", Path(__file__).relative_to(ROOT).as_posix())
    names = [name for name in done.stdout.splitlines() if name not in skipped]
    return {name: (ROOT / name).read_text(errors="ignore") for name in names if (ROOT / name).is_file()}


def test_nothing_switches_the_token_off_or_opens_a_dashboard():
    for name, text in tracked().items():
        assert not re.search(r"RAY_AUTH_MODE\W{1,4}disabled", text), name
        assert not re.search(r"dashboard-host\W{1,3}0\.0\.0\.0", text), name


def test_pages_that_submit_a_job_say_that_the_token_has_to_be_on():
    pages = {name: text for name, text in tracked().items() if name.endswith(".md") and "ray job submit" in text}
    assert {"README.md", "docs/cluster.md", "cluster/README.md"} <= set(pages)
    blocks = {name: FENCE.findall(text) for name, text in pages.items()}
    printing = {name for name, found in blocks.items() if any("ray job submit" in block for _, block in found)}
    assert {name for name in printing if "RAY_AUTH_MODE=token" not in pages[name]} == set()
