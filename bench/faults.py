"""Injects faults at seeded random moments into runs on a cluster of three hosts, and compares each run's end.

    python bench/faults.py [--runs 4] [--faults 8] [--seed 0] [--only "rank killed" ...] [--out FILE]

The cluster is a head and two workers with one CPU each, hosts of their own on this machine (bench/hosts.py). The driver
is on the head; with --keep-head-state it is on a worker, and the head may be lost and come back with the cluster's
state. Every run draws its faults and moments; decisions, plan and weights must be those of the undisturbed
run. The seconds of a recovery are those from the fault to the next event of the journal, with the work in between.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hosts
import interruptions
from machine import machine

LONG_S = 900.0
"""No recovery takes longer, or the run hangs."""
SETTINGS = {
    "prune.flops_reduction": 0.12,
    "train.epochs": 4,
    "train.prune_epoch": 2,
}


class HungError(Exception):
    """The run makes no progress."""


@dataclass(frozen=True)
class Outcome:
    """What came of an injection: the seconds to the next event."""

    fault: str
    event: str
    seconds: float


class Run:
    """A run of the digits' recipe. Its driver is on the head, or on the first worker if the head keeps its state."""

    def __init__(self, cluster: hosts.Hosts, storage: Path, name: str) -> None:
        self.cluster, self.storage, self.name = cluster, storage, name
        self.host = 1 if cluster.keeps_state else 0
        self.log = storage / f"{name}.log"
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts a driver: the first one, or the same command again."""
        command = interruptions.command(self.storage, self.name, True, SETTINGS)
        with self.log.open("ab") as file:
            return self.cluster.run(self.host, command, stdout=file)

    def events(self) -> list[str]:
        return [interruptions.kind_of(path) for path in interruptions.journal(self.storage, self.name)]

    def wait(self, condition: Callable[[], bool], what: str, allowed: tuple[subprocess.Popen[bytes], ...] = ()) -> None:
        """Waits for the condition. A driver that has ended with an error ends the wait, too, unless it is `allowed`."""
        deadline = time.monotonic() + LONG_S
        while not condition():
            if time.monotonic() > deadline:
                raise HungError(f"{what}: nothing for {LONG_S:g} s\n{self.said()}")
            if self.driver not in allowed and self.driver.poll() not in (None, 0):
                raise HungError(f"{what}: the driver ended with {self.driver.returncode}\n{self.said()}")
            time.sleep(0.02)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def signal(self, title: str, number: int) -> bool:
        """A signal to one process of the run on any host; False if there is none."""
        found = [pid for host in self.cluster.alive() for pid in self.cluster.processes(host, title)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                return True
        return False

    def drivers(self) -> list[int]:
        return self.cluster.processes(self.host, "jobs/prune.py")

    def signal_driver(self, number: int) -> None:
        for pid in self.drivers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def worker_hosts(self) -> list[int]:
        """The workers that are alive and have no driver."""
        return [host for host in self.cluster.alive() if host not in (0, self.host)]

    def kill_driver(self) -> None:
        self.signal_driver(signal.SIGKILL)
        self.driver.wait()


def of_process(title: str, number: int) -> Callable[[Run, random.Random], bool]:
    return lambda run, draw: run.signal(title, number)


def driver_killed(run: Run, draw: random.Random) -> bool:
    run.kill_driver()
    run.driver = run.start()
    return True


def driver_terminated(run: Run, draw: random.Random) -> bool:
    run.signal_driver(signal.SIGTERM)
    run.driver.wait(timeout=60)
    run.driver = run.start()
    return True


def driver_wakes(run: Run, draw: random.Random) -> bool:
    """The driver is stopped, another takes over, and the first one wakes."""
    first = run.drivers()
    for pid in first:
        os.kill(pid, signal.SIGSTOP)
    old, attempt = run.driver, _attempt(run)
    run.driver = run.start()
    run.wait(lambda: _attempt(run) > attempt, "another driver takes over", allowed=(old,))
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + LONG_S  # it finds out when it next writes
    while old.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if old.poll() in (None, 0):
        raise HungError("the driver that woke up ended as if it had the run")
    return True


def _attempt(run: Run) -> int:
    """The number of the last driver that took the run."""
    return max((int(path.stem) for path in (run.storage / run.name / "owner").glob("[0-9]*.json")), default=0)


def two_drivers(run: Run, draw: random.Random) -> bool:
    """A second driver is started: one of the two is refused, as a rule the second, and the other has the run."""
    first, second = run.driver, run.start()
    run.driver = second  # both may have to wait until an earlier owner is known to be dead
    run.wait(lambda: first.poll() is not None or second.poll() is not None, "two drivers", allowed=(first, second))
    refused = second if second.poll() not in (None, 0) else first
    run.driver = first if refused is second else second
    if refused.poll() == 0:  # the other finds a finished run
        return run.driver.wait(timeout=LONG_S) == 0
    if "another driver has" not in run.said():
        raise HungError(f"the driver that was refused did not say why\n{run.said()}")
    return True


def host_lost(run: Run, draw: random.Random) -> bool:
    """A worker host is gone for good."""
    alive = run.worker_hosts()
    if len(run.cluster.alive()) < 3:
        return False
    run.cluster.kill(draw.choice(alive))
    return True


def host_returns(run: Run, draw: random.Random) -> bool:
    """A worker host loses its power and comes back."""
    alive = run.worker_hosts()
    if len(run.cluster.alive()) < 3:
        return False
    host = draw.choice(alive)
    run.cluster.kill(host)
    run.cluster.start(host)
    return True


def host_cut_off(run: Run, draw: random.Random) -> bool:
    """A worker host is off the network for 20 s."""
    alive = run.worker_hosts()
    if not alive:
        return False
    host = draw.choice(alive)
    run.cluster.cut(host, off=True)
    time.sleep(20)
    run.cluster.cut(host, off=False)
    return True


def head_lost(run: Run, draw: random.Random) -> bool:
    """The head is lost with the driver; a new cluster is started, and the same command is given again."""
    for host in run.cluster.alive():
        run.cluster.kill(host)
    run.driver.wait()
    run.cluster.up()
    run.driver = run.start()
    return True


def head_returns(run: Run, draw: random.Random) -> bool:
    """The head loses its power for 10 s and comes back with the cluster's state; the driver is elsewhere."""
    if not run.cluster.keeps_state:
        return False
    run.cluster.kill(0)
    time.sleep(10)
    run.cluster.start(0)
    return True


def torn_event(run: Run, draw: random.Random) -> bool:
    """The driver dies, and the journal's last event is cut off."""
    run.kill_driver()
    last = interruptions.journal(run.storage, run.name)[-1]
    content = last.read_bytes()
    last.write_bytes(content[: draw.randrange(len(content) // 2)])
    run.driver = run.start()
    return True


TRAINING, SEARCH, ANY = ("epoch", "training_phase"), ("iteration",), ()
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[Run, random.Random], bool]]] = {
    "search worker killed": (SEARCH, of_process("ray::SearchWorker", signal.SIGKILL)),
    "rank killed": (TRAINING, of_process("ray::RayTrainWorker", signal.SIGKILL)),
    "mailbox killed": (TRAINING, of_process("ray::Mailbox", signal.SIGKILL)),
    "rank stopped": (TRAINING, of_process("ray::RayTrainWorker", signal.SIGSTOP)),
    "search worker stopped": (SEARCH, of_process("ray::SearchWorker", signal.SIGSTOP)),
    "mailbox stopped": (TRAINING, of_process("ray::Mailbox", signal.SIGSTOP)),
    "driver killed": (ANY, driver_killed),
    "driver terminated": (ANY, driver_terminated),
    "driver stopped, wakes after another took over": (ANY, driver_wakes),
    "two drivers at once": (ANY, two_drivers),
    "worker host lost for good": (ANY, host_lost),
    "worker host lost, comes back": (ANY, host_returns),
    "worker host off the network for 20 s": (ANY, host_cut_off),
    "head and driver lost": (ANY, head_lost),
    "head lost, comes back with its state": (ANY, head_returns),
    "last event torn": (ANY, torn_event),
}
"""Name -> (the events that must come next, what happens; False where it cannot happen)."""


def drawn(events: list[str], gaps: list[float], count: int, names: list[str], draw: random.Random) -> list[tuple]:
    """(event, seconds after it, fault), in order of events."""
    chosen = []
    while len(chosen) < count:
        name = draw.choice(names)
        before, _ = FAULTS[name]
        usable = [event for event in range(len(events) - 1) if not before or events[event + 1] in before]
        event = draw.choice(usable)
        chosen.append((event, draw.uniform(0, gaps[event]), name))
    return sorted(chosen)


def disturbed(run: Run, faults: list[tuple], draw: random.Random) -> list[Outcome]:
    """Carries out a run with its faults."""
    outcomes = []
    for event, delay, name in faults:
        run.wait(lambda event=event: len(run.events()) > event or run.driver.poll() == 0, f"before {name}")
        if run.driver.poll() == 0:
            break
        time.sleep(delay)
        there, began = len(run.events()), time.monotonic()
        _, happens = FAULTS[name]
        if run.driver.poll() is not None or not happens(run, draw):
            print(f"      {name}: not possible at this moment", flush=True)
            continue
        there = min(there, len(run.events()))
        run.wait(lambda there=there: len(run.events()) > there or run.driver.poll() == 0, f"after {name}")
        outcomes.append(Outcome(name, run.events()[event], time.monotonic() - began))
        print(f"      {outcomes[-1].seconds:6.1f} s  {name}, {delay:.1f} s after event {event}", flush=True)
    run.wait(lambda: run.driver.poll() == 0, "to the end")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--faults", type=int, default=8, help="faults a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(FAULTS), metavar="FAULT", help="these faults only")
    parser.add_argument("--keep-head-state", action="store_true", help="the driver is on a worker, see above")
    parser.add_argument("--out", type=Path, help="a JSON file for the outcomes")
    options = parser.parse_args()
    reason = hosts.missing()
    if reason is not None:
        raise SystemExit(reason)
    print(machine("ray"))
    kept = options.keep_head_state
    names = options.only or [
        name for name, (_, what) in FAULTS.items() if what is not (head_lost if kept else head_returns)
    ]
    outcomes: list[Outcome] = []
    failures: list[str] = []
    with hosts.Hosts(keeps_state=kept) as cluster:
        cluster.up()
        began = time.monotonic()
        peace = Run(cluster, cluster.folder, "peace")
        peace.wait(lambda: peace.driver.poll() == 0, "the undisturbed run")
        print(f"undisturbed: {time.monotonic() - began:.0f} s")
        expected, kinds = interruptions.outcome(cluster.folder, "peace"), peace.events()
        times = [json.loads(path.read_text())["time"] for path in interruptions.journal(cluster.folder, "peace")]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        for number in range(options.runs):
            draw = random.Random(f"{options.seed}/{number}")
            for host in (0, *cluster.workers):
                if host not in cluster.alive():
                    cluster.start(host)
            run = Run(cluster, cluster.folder, f"run{number}")
            print(f"run {number}", flush=True)
            try:
                outcomes += disturbed(run, drawn(kinds, gaps, options.faults, names, draw), draw)
                found = interruptions.outcome(cluster.folder, run.name)
                verdict = "the same" if found == expected else f"DIFFERENT: {found}, expected {expected}"
                print(f"      decisions, plan and weights: {verdict}", flush=True)
                failures += [f"run {number}: {verdict}"] if found != expected else []
            except HungError as error:
                failures.append(f"run {number}: {error}")
                print(f"      FAILED: {error}", flush=True)
                run.kill_driver()
    report(outcomes, failures)
    if options.out is not None:
        rows = [outcome.__dict__ for outcome in outcomes]
        options.out.write_text(
            json.dumps({"machine": machine("ray"), "outcomes": rows, "failures": failures}, indent=1)
        )
    if failures:
        sys.exit(1)


def report(outcomes: list[Outcome], failures: list[str]) -> None:
    """Prints the table of docs/faults.md."""
    seconds = defaultdict(list)
    for outcome in outcomes:
        seconds[outcome.fault].append(outcome.seconds)
    print("\n| fault | times | seconds to the next event: median | most |\n|---|---|---|---|")
    for name in FAULTS:
        if name in seconds:
            print(
                f"| {name} | {len(seconds[name])} | {statistics.median(seconds[name]):.0f} | {max(seconds[name]):.0f} |"
            )
    print(f"\n{len(outcomes)} faults, {len(failures)} failures")
    for failure in failures:
        print(failure)


if __name__ == "__main__":
    main()
