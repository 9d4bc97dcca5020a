"""bench/gpu.py, whole runs: the digits' recipe on Ray, trainer and search worker on one GPU, and again after a kill."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import interruptions
from gpu_results import Rows
from run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
ONE = {"cluster.workers": 1}
"""One GPU has room for one trainer and one search worker."""
TOY = interruptions.SETTINGS | {
    "prune.flops_reduction": 0.02,
    "prune.fine_tune_every": 0.9,
    "search.images": 20,
    "search.batch_size": 20,
    "train.epochs": 1,
    "train.prune_epoch": 0,
    "train.drop_epochs": [],
}


def whole_run(options: argparse.Namespace, rows: Rows) -> None:
    """One run left in peace, and one whose driver is killed after its first iteration and started again."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:  # a short path: Ray's sockets lie below it
        runs = Runs(options, Path(folder))
        with rows.trying("a whole run on Ray"):
            seconds = runs.whole("peace")
            rows.add("a whole run on Ray", runs.figures("peace") | {"seconds": seconds}, True)
            if not options.toy:
                expected = {"RayTrainWorker", "SearchWorker"}
                found = runs.on_gpu
                rows.add("trainer and search worker on the GPU", {"seen": sorted(found)}, expected <= found)
        with rows.trying("resumed after a kill"):
            killed_at, seconds = runs.killed("killed")
            ours, theirs = (RunFolder(str(runs.storage / name)).outcome() for name in ("killed", "peace"))
            same = {key: "same" if ours[key] == theirs[key] else "different" for key in theirs}
            rows.add(
                "resumed after a kill",
                same | {"killed at event": killed_at, "seconds": seconds},
                same["plan"] == "same",
            )


class Runs:
    """Runs in `folder`, on a cluster of Ray that each starts for itself, in a folder of its own."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.storage, self._log, self._options = folder / "runs", options.out / "run-drivers.log", options
        self._environment = {**os.environ, "RAY_TMPDIR": str(folder / "ray"), "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment.pop("RAY_ADDRESS", None)
        (folder / "ray").mkdir()
        self.on_gpu: set[str] = set()
        """The kinds of this stage's processes that were seen with memory of the GPU."""

    def start(self, name: str) -> subprocess.Popen[bytes]:
        recipe, settings = ("resnet20_cifar10", TOY | ONE) if self._options.toy else ("resnet50_digits", ONE)
        command = [sys.executable, str(ROOT / "jobs" / "prune.py"), recipe]
        command += ["--storage", str(self.storage), "--name", name]
        for key, value in settings.items():
            command += ["--set", f"{key}={interruptions.json.dumps(value)}"]
        with self._log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=self._environment)

    def whole(self, name: str) -> float:
        """The seconds of a run left in peace."""
        began = time.monotonic()
        self._to_its_end(self.start(name))
        return time.monotonic() - began

    def killed(self, name: str) -> tuple[int, float]:
        """After how many events the driver was killed, and the seconds of both parts of the run."""
        began = time.monotonic()
        process, folder = self.start(name), RunFolder(str(self.storage / name))
        if not interruptions.wait_for(lambda: "iteration" in folder.kinds(), process):
            raise RuntimeError(f"the run ended before its first iteration: {self._said()}")
        process.kill()
        process.wait()
        events = len(folder.files())
        self._to_its_end(self.start(name))
        return events, time.monotonic() - began

    def figures(self, name: str) -> dict[str, Any]:
        """What the run's own journal says."""
        folder = RunFolder(str(self.storage / name))
        kinds, times, decisions = folder.kinds(), folder.times(), folder.decisions()
        data = folder.storage.read_json(folder.files()[-1])["data"]
        found = {"iterations": len(decisions), "FLOPs reduction": decisions[-1]["flops_reduction"]}
        found |= {"top-1": data["metrics"]["top1"]}
        steps = zip(kinds[1:], times, times[1:], strict=False)
        between = [after - before for kind, before, after in steps if kind == "iteration"]
        return found | {"seconds an iteration": sorted(between)[len(between) // 2]}

    def _to_its_end(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            time.sleep(0.5)
            if not self._options.toy:
                self._look(process.pid)
        if process.returncode:
            raise RuntimeError(f"the driver ended with {process.returncode}: {self._said()}")

    def _look(self, driver: int) -> None:
        command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        users = {int(line) for line in done.stdout.split() if line.isdigit()}
        for process, title in interruptions.descendants(driver).items():
            if process in users:
                self.on_gpu |= {kind for kind in ("RayTrainWorker", "SearchWorker") if kind in title}

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]
