"""A cluster that cluster/local.py brings up on ports of its own, for as long as a test lasts."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "cluster" / "local.py"
PORT = 28379
"""Not the script's own: somebody may have a cluster there."""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@contextmanager
def local_cluster(nodes: int) -> Iterator[dict[str, str]]:
    """Gives the environment of a shell that was given the lines that `up` prints; takes the cluster down at the end."""
    with tempfile.TemporaryDirectory(prefix="lr", dir="/tmp") as parent:  # sockets need a short path, pytest's is long
        folder = f"{parent}/c"
        done = run("up", f"--nodes={nodes}", "--cpus-per-node=1", f"--port={PORT}", "--folder", folder)
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("export ") for line in done.stdout.splitlines() if line.startswith("export ")]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        try:
            yield {**kept, **dict(line.split("=", 1) for line in lines)}
        finally:
            done = run("down", "--folder", folder)
        assert done.returncode == 0, done.stderr
        assert not os.path.exists(folder)
