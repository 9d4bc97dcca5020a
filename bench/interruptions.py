"""Kills a run at seeded random moments, starts it again each time, and compares its end with a run left in peace.

    python bench/interruptions.py [--kills 20] [--seed 0] [--no-ray]

Each moment is a delay after some event of the journal; every kind of event is met at least once, and at least one
moment lies in the middle of a training phase. Three of four kills are SIGKILL to the driver, whose Ray session goes
with it; every fourth is SIGKILL to one trainer while the driver lives. Decisions, plan and weights must come out the
same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from machine import machine
from run_folder import RunFolder

from laasp_ray.cli.flags import overridden
from laasp_ray.config import RunConfig
from laasp_ray.recipes import recipe

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "model.input_shape": [3, 16, 16],
    "data.path": None,
    "data.format": "digits",
    "data.train_transform": "random_resized_crop",
    "data.image_size": 16,
    "data.eval_resize": 16,
    "data.scale": [0.8, 1.0],
    "data.flip": 0.0,
    "data.threads": 1,
    "prune.flops_reduction": 0.15,
    "prune.step": 0.03,
    "prune.fine_tune_every": 0.05,
    "prune.fine_tune_epochs": 2,
    "search.images": 100,
    "search.batch_size": 50,
    "train.epochs": 4,
    "train.prune_epoch": 2,
    "train.batch_size": 128,
    "train.drop_epochs": [2],
    "train.learning_rate": 0.05,
    "cluster.workers": 2,
    "export.format": "none",
    "export.latency": [],
}
Settings = Mapping[str, object]
"""Config keys and values, over those of SETTINGS."""

NOTHING_ELSE: Settings = MappingProxyType({})


@dataclass(frozen=True)
class Moment:
    """`delay_s` seconds after the journal's event number `event` (counted from 0) was written."""

    event: int
    kind: str
    delay_s: float
    target: str


def command(storage: Path | str, name: str, ray: bool, settings: Settings) -> list[str]:
    arguments = [
        sys.executable,
        str(ROOT / "jobs" / "prune.py"),
        "resnet20_cifar10",
        "--storage",
        str(storage),
        "--name",
        name,
    ]
    for key, value in {**SETTINGS, **settings}.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    return arguments if ray else [*arguments, "--no-ray"]


def config_of(storage: Path, name: str, settings: Settings, of: str = "resnet20_cifar10") -> RunConfig:
    """The config that `command` gives a run, of another recipe if `of` names one."""
    values = {**SETTINGS, **settings, "storage": str(storage), "name": name}
    given = argparse.Namespace(flags={}, set=[f"{key}={json.dumps(value)}" for key, value in values.items()])
    return overridden(recipe(of), given)


def draw_moments(events: list[str], gaps: list[float], kills: int, seed: int, ray: bool) -> list[Moment]:
    """Every kind of event once, and the rest at random; none after the last event: there is nothing left to kill."""
    draw = random.Random(seed)
    usable = range(len(events) - 1)
    first = {
        kind: draw.choice([i for i in usable if events[i] == kind]) for kind in sorted({events[i] for i in usable})
    }
    chosen = sorted([*first.values(), *(draw.choice(usable) for _ in range(max(0, kills - len(first))))])[:kills]
    moments = []
    for number, event in enumerate(chosen):
        target = "trainer" if ray and number % 4 == 3 and events[event + 1] in ("epoch", "training_phase") else "driver"
        moments.append(Moment(event, events[event], draw.uniform(0, gaps[event]), target))
    return moments


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 300) -> bool:
    """False if the process ended before the condition held."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    raise SystemExit(f"the run made no progress for {seconds:g} s")


def descendants(root: int) -> dict[int, str]:
    """Process id -> command line of all that `root` has started, directly or not; of no other run on this machine."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended while we looked
    found = {root}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return {process: titles[process] for process in found - {root} if process in titles}


def kill_one(root: int, title: str) -> bool:
    """SIGKILL to one descendant of `root` whose command line holds `title`; False if there is none."""
    for process, found in descendants(root).items():
        if title in found:
            os.kill(process, signal.SIGKILL)
            return True
    return False


def start(storage: Path, name: str, ray: bool, log: Path, settings: Settings = NOTHING_ELSE) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command(storage, name, ray, settings), stdout=file, stderr=file, start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-ray", action="store_true", help="in one process: quicker, and only the driver to kill")
    options = parser.parse_args()
    ray = not options.no_ray
    print(f"{machine('ray')}, Ray used: {ray}")
    with tempfile.TemporaryDirectory() as folder:
        storage, log = Path(folder), Path(folder) / "log"
        begun = time.monotonic()
        process = start(storage, "peace", ray, log)
        if process.wait() != 0:
            raise SystemExit(log.read_text()[-4000:])
        print(f"left in peace: {time.monotonic() - begun:.0f} s")
        peace = RunFolder(str(storage / "peace"))
        gaps = [after - before for before, after in itertools.pairwise(peace.times())]
        moments = draw_moments(peace.kinds(), gaps, options.kills, options.seed, ray)
        disturbed_s = disturb(storage, moments, ray, log)
        expected, found = peace.outcome(), RunFolder(str(storage / "disturbed")).outcome()
        for key in expected:
            print(f"{key:10} {expected[key]}  {found[key]}  {'same' if expected[key] == found[key] else 'DIFFERENT'}")
        print(f"{len(moments)} kills, {disturbed_s:.0f} s")
        if expected != found:
            raise SystemExit("the disturbed run came out differently")


def disturb(storage: Path, moments: list[Moment], ray: bool, log: Path, settings: Settings = NOTHING_ELSE) -> float:
    begun = time.monotonic()
    process, folder = start(storage, "disturbed", ray, log, settings), RunFolder(str(storage / "disturbed"))
    for number, moment in enumerate(moments, 1):
        alive = wait_for(lambda m=moment: len(folder.files()) > m.event, process)
        if not alive:
            raise SystemExit("the run ended before its time:\n" + log.read_text()[-4000:])
        time.sleep(moment.delay_s)
        lost = len(folder.files()) - 1
        if moment.target == "trainer" and kill_one(process.pid, "RayTrainWorker"):
            print(f"{number:3}  {moment.delay_s:5.2f} s after {moment.kind} ({moment.event}): a trainer killed")
            continue
        process.kill()
        process.wait()
        print(
            f"{number:3}  {moment.delay_s:5.2f} s after {moment.kind} ({moment.event}): driver killed at event {lost}",
            flush=True,
        )
        process = start(storage, "disturbed", ray, log, settings)
    if process.wait() != 0:
        raise SystemExit(log.read_text()[-4000:])
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
