"""A sweep over targets against separate runs, on real images; the sweep is killed once and goes on.

    python bench/sweep.py --data DATA [--targets 0.14 0.16 0.18 0.2] [--out FOLDER]

DATA is the folder of development data: the runs begin with `checkpoints/resnet20_epoch130` and use `cifar10_mini`. All
are commands of their own, with the same settings and workers, one after the other on this machine. The sweep's driver
is killed with SIGKILL when the trials of the shallower half are finished, and the same command goes on. Plans and
weights of each trial are compared with those of the run for its target alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine

from laasp_ray import load_pruned, models
from laasp_ray.recipes import recipe
from laasp_ray.report.tables import table_lines
from laasp_ray.run.events import IterationDone, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "resnet20_cifar10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.14, 0.16, 0.18, 0.2])
    parser.add_argument("--epochs", type=int, default=131, help="of the schedule, of which the first 130 are done")
    parser.add_argument("--images", type=int, default=500, help="calibration images")
    parser.add_argument("--out", type=Path, help="where the runs are kept (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        print(machine("ray"), flush=True)
        common = [RECIPE, "--data", str(options.data / "cifar10_mini"), "--storage", str(out)]
        common += ["--variant", "paper"]
        common += ["--pretrained", str(options.data / "checkpoints" / "resnet20_epoch130.safetensors")]
        common += ["--prune-epoch", "130", "--epochs", str(options.epochs)]
        common += ["--calibration-images", str(options.images)]
        common += ["--export", "none", "--set", "export.latency=[]"]
        seconds = {"sweep": swept(common, options.targets, out)}
        for target in options.targets:
            seconds[alone(target)] = timed(
                [
                    "jobs/prune.py",
                    *common,
                    *("--flops-reduction", str(target), "--name", alone(target)),
                    *("--set", "prune.exact_target=false"),  # as a sweep's trials
                ]
            )
        report(seconds, options.targets, out)


def alone(target: float) -> str:
    return f"alone-{target:g}"


def timed(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return time.monotonic() - began


def swept(common: list[str], targets: list[float], out: Path) -> float:
    """The seconds of a sweep that is killed once, without the pause between."""
    command = ["jobs/sweep_flops.py", *common, "--flops-reduction", *map(str, targets), "--name", "sweep"]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    middle = sorted(targets)[len(targets) // 2 - 1]
    while process.poll() is None and not finished(out / "sweep" / f"flops-{middle:g}"):
        time.sleep(0.5)
    first = time.monotonic() - began
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        print(f"the sweep's driver is killed after {first:.0f} s", flush=True)
    process.wait()
    time.sleep(10)  # Ray's processes end on their own
    return first + timed(command)


def finished(folder: Path) -> bool:
    return any((folder / "journal").glob("*-finish.json"))


def report(seconds: dict[str, float], targets: list[float], out: Path) -> None:
    rows = [("target", "alone, s", "top-1 alone", "in the sweep", "same plans", "same weights")]
    content = json.loads((out / "sweep" / "sweep.json").read_text())
    found = {row["name"]: row for row in content["trials"]}
    for target in targets:
        ours, theirs = out / "sweep" / f"flops-{target:g}", out / alone(target)
        weights = [load_pruned(folder, models.build(recipe(RECIPE).model)).state_dict() for folder in (ours, theirs)]
        same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        top1 = json.loads(next((theirs / "journal").glob("*-finish.json")).read_text())["data"]["metrics"]["top1"]
        row = found[f"flops-{target:g}"]
        rows.append(
            (
                f"{target:.2%}",
                f"{seconds[alone(target)]:.0f}",
                f"{100 * top1:.2f}%",
                f"{row['top1_after']:.2f}%",
                str(steps(ours) == steps(theirs)),
                str(same),
            )
        )
    print("\n".join(table_lines(rows)))
    separate = sum(seconds.values()) - seconds["sweep"]
    ratio = seconds["sweep"] / separate
    print(f"sweep, killed once: {seconds['sweep']:.0f} s; separate runs: {separate:.0f} s; ratio {ratio:.3f}")


def steps(folder: Path) -> list[object]:
    events = read_events(Journal(Storage.open(str(folder))))
    return [event.step for event in events if isinstance(event, IterationDone)]


if __name__ == "__main__":
    main()
