"""Proves a machine with a GPU in one command: what is right there, how fast it is, stage by stage, in under 9 minutes.

    python bench/gpu.py [--device cuda|cpu] [--out FOLDER] [--data DATA] [--images JPEGS] [--cifar10 PARQUET]
                        [--wheels FOLDER] [--minutes 8.8] [--only STAGE ...]

Each stage is a process with a time limit of its own, in order of worth; one that fails, hangs or is late takes no other
with it. FOLDER gets `results.json` and `results.md`, which are whole at any moment, and each stage's log. DATA is the
folder of development data (checkpoints/, cifar10_mini, imagenet_sample), JPEGS one of class folders, PARQUET a CIFAR-10
data set; without them images are noise, or are drawn. `--wheels` installs the wheels of a folder for this command. No
network is needed. `--device cpu` rehearses all of it at toy size, in about four minutes, and says so in its results.
Exit status: 0 if every check passed, 1 if one did not or a stage failed, 2 if nothing can be measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(ROOT)]  # runs from a checkout that is not installed

import gpu_packages  # noqa: E402
from gpu_results import ROWS, Results, Rows, StageResult  # noqa: E402

LOOK_S = 0.2
PRELOADED = ("gpu_right", "gpu_search", "gpu_training", "gpu_data", "gpu_latency")
LEAST_S = 8.0
"""A stage with less time than this is not started."""


@dataclass(frozen=True)
class Stage:
    """`function` of `module` gets (options, rows). `seconds` is its limit on a GPU, `cpu_seconds` in a rehearsal.

    One that is `fresh` has an interpreter of its own: whatever the installed packages do there, the others go on.
    """

    name: str
    module: str
    function: str
    seconds: float
    cpu_seconds: float
    needs: tuple[str, ...] = ()
    gpu_only: bool = False
    fresh: bool = False


STAGES = (
    Stage("machine", "gpu_machine", "look", 40, 60, fresh=True),
    Stage("losses", "gpu_right", "losses", 80, 120),
    Stage("choice", "gpu_right", "choice", 60, 120),
    Stage("run", "gpu_run", "whole_run", 170, 240, needs=("ray",)),
    Stage("search", "gpu_search", "iteration", 120, 120),
    Stage("training", "gpu_training", "synthetic", 60, 60),
    Stage("data", "gpu_data", "real_images", 75, 120),
    Stage("latency", "gpu_latency", "latencies", 90, 120),
    Stage("sparse kernels", "gpu_right", "kernels", 30, 30, gpu_only=True),
    Stage("compiled training", "gpu_training", "compiled", 110, 90),
    Stage("accuracy", "gpu_accuracy", "accuracy", 300, 60),
)


def main() -> int:
    options = parse()
    if options.stage:
        return run_stage(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the stage that runs
    options.out.mkdir(parents=True, exist_ok=True)
    for old in (ROWS, "results.json", "results.md"):
        (options.out / old).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        if options.wheels is not None:
            site = gpu_packages.install_wheels(options.wheels, Path(scratch) / "site")
            gpu_packages.put_on_path(site)
        gpu_packages.put_on_path(str(HERE), str(ROOT))
        return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Runs the stages one after the other, and writes the results after each, and while it runs."""
    deadline = time.monotonic() + 60 * options.minutes
    results = Results(options.out, options.device, machine_of(options))
    results.write()
    core = gpu_packages.missing(gpu_packages.CORE)
    for stage in chosen(options.only):
        if not stage.fresh and not core:
            preload()
        limit = min(stage.cpu_seconds if options.device == "cpu" else stage.seconds, deadline - time.monotonic())
        reason = why_not(stage, options.device, core, limit)
        if reason:
            results.stages.append(StageResult(stage.name, "skipped", reason=reason))
        else:
            print(f"-- {stage.name} (at most {limit:.0f} s)", flush=True)
            results.stages.append(start_and_wait(stage, options, limit, results))
        done = results.stages[-1]
        print(f"-- {stage.name}: {done.outcome}, {done.seconds:.0f} s {done.reason}", flush=True)
        results.write()
        if stage.name == "machine" and done.outcome != "done" and (core or options.device == "cuda"):
            print(f"error: nothing can be measured here: {done.reason or 'see ' + str(options.out)}", file=sys.stderr)
            return 2
    print((options.out / "results.md").read_text())
    wrong = any(row["passed"] is False for row in results.rows())
    return int(wrong or any(stage.outcome in ("failed", "late") for stage in results.stages))


def chosen(only: list[str] | None) -> list[Stage]:
    """The stages to run: all, or the machine and those named."""
    return [stage for stage in STAGES if not only or stage.name in ("machine", *only)]


def why_not(stage: Stage, device: str, core: list[str], limit: float) -> str:
    """Why a stage is not run; empty if it is."""
    if core:
        return f"missing packages: {', '.join(core)}; put their wheels into a folder and give it as --wheels"
    if stage.gpu_only and device == "cpu":
        return "needs an NVIDIA GPU"
    lacking = gpu_packages.missing(stage.needs)
    if lacking:
        return f"missing packages: {', '.join(lacking)}"
    return "" if limit >= LEAST_S else "no time is left"


def start_and_wait(stage: Stage, options: argparse.Namespace, limit: float, results: Results) -> StageResult:
    """Runs a stage in a process of its own. All that it started is ended with it."""
    from processes import Descendants

    began = time.monotonic()
    log = options.out / f"{stage.name.replace(' ', '-')}.log"
    options = argparse.Namespace(**vars(options) | {"seconds": limit})
    process: Process = Started(stage, options, log) if stage.fresh else Forked(stage, options, log)
    family, rows = Descendants(process.pid), len(results.rows())
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(LOOK_S)
            family.look()
            if len(results.rows()) != rows:
                rows = len(results.rows())
                results.write()
        status = process.poll()
    finally:
        family.look()
        if process.poll() is None:
            process.kill()
        process.wait()
        family.kill()
    seconds = time.monotonic() - began
    if status is None:
        return StageResult(stage.name, "late", seconds, limit, "its time was over")
    if status:
        said = log.read_text(errors="replace").strip().splitlines()
        reason = f"exit status {status}: {said[-1][:300] if said else ''}"
        return StageResult(stage.name, "failed", seconds, limit, reason)
    return StageResult(stage.name, "done", seconds, limit)


class Process(Protocol):
    """A stage that runs. `poll` gives its exit status once it has ended."""

    pid: int

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> object: ...


class Started(subprocess.Popen[bytes]):
    """A stage in a new interpreter."""

    def __init__(self, stage: Stage, options: argparse.Namespace, log: Path) -> None:
        command = [sys.executable, "-u", str(Path(__file__).resolve()), *sys.argv[1:], "--stage", stage.name]
        command += ["--seconds", f"{options.seconds:.1f}"]
        with log.open("wb") as file:
            super().__init__(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


class Forked:
    """A stage in a copy of this process, which has imported what stages need, so that the copy need not.

    This process never touches the GPU, because a copy could not use it then.
    """

    def __init__(self, stage: Stage, options: argparse.Namespace, log: Path) -> None:
        sys.stdout.flush()
        options = argparse.Namespace(**vars(options) | {"stage": stage.name})
        self._process = multiprocessing.get_context("fork").Process(target=_in_a_copy, args=(options, log))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> object:
        return self._process.join()


def preload() -> None:
    """Imports the modules of the stages."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the stage that needs it says so
            importlib.import_module(name)


def _in_a_copy(options: argparse.Namespace, log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)
    status = 1
    try:
        status = run_stage(options)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the clean-up of what this process's parent has


def run_stage(options: argparse.Namespace) -> int:
    """One stage, in this process."""
    stage = next(one for one in STAGES if one.name == options.stage)
    if options.toy:
        import torch

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)  # other programs have the rest
    getattr(importlib.import_module(stage.module), stage.function)(options, Rows(options.out, stage.name))
    return 0


def machine_of(options: argparse.Namespace) -> dict[str, object]:
    """What is known of the machine before torch is imported."""
    found: dict[str, object] = {
        "command": " ".join(["python bench/gpu.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "Python": sys.version.split()[0],
        "packages": [f"{name} {version}" for name, version in gpu_packages.versions().items()],
    }
    if lacking := gpu_packages.missing([*gpu_packages.NAMED, *(need for stage in STAGES for need in stage.needs)]):
        found["missing"] = lacking
    if outside := gpu_packages.outside_range(ROOT / "pyproject.toml"):
        found["outside of the range of pyproject.toml"] = outside
    query = "--query-gpu=name,driver_version,memory.total"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        found["nvidia-smi"] = (done.stdout or done.stderr).strip().splitlines()
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results (default runs/gpu or runs/gpu-rehearsal)")
    parser.add_argument("--data", type=Path, help="the folder of development data")
    parser.add_argument("--images", type=Path, help="class folders of JPEGs (default: DATA/imagenet_sample, or drawn)")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet, for the stage accuracy")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this command")
    parser.add_argument("--minutes", type=float, default=8.8, help="no stage goes on after them (default 8.8)")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="the machine and these")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("data", "images", "cifar10", "wheels"):
        path = getattr(options, name)
        if path is not None:
            if not path.exists():
                parser.error(f"--{name}: there is no {path}")
            setattr(options, name, path.resolve())
    default = ROOT / "runs" / ("gpu" if options.device == "cuda" else "gpu-rehearsal")
    options.out = (options.out or default).resolve()
    if options.images is None and options.data is not None and (options.data / "imagenet_sample").is_dir():
        options.images = options.data / "imagenet_sample"
    options.toy = options.device == "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
