"""Injects faults at seeded random moments into runs on a cluster of three hosts, and compares each run's end.

    python bench/faults.py [--mode MODE] [--runs 4] [--faults 8] [--only "rank killed" ...] [--out FILE]
    python bench/faults.py --table FILE

The cluster is a head and two workers with one CPU each, hosts of their own on this machine (bench/hosts.py). The modes:

- plain: the driver is on the head, and runs are stored on a disk of their own.
- kept state: the driver is on a worker; the head may be lost, and comes back with the cluster's state.
- s3: runs are stored on a server that speaks S3, behind a proxy that breaks things.
- jobs: every start of a driver is a job of the cluster.
- clock: the driver's clock can be moved (libfaketime).

Every run draws its faults, those first that FILE has least of, and their moments. Decisions, plan and weights must be
those of the undisturbed run. The seconds of a recovery are those from the fault to the next event of the journal, with
the work in between.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import hosts
from disturbed_run import HungError, Place, Run
from fault_kinds import ANY, FAULTS, MEMORY_SHORT, Mode
from machine import machine
from object_stores import s3_store
from run_folder import RunFolder

SETTINGS = {
    "prune.flops_reduction": 0.3,
    "train.epochs": 10,
    "train.prune_epoch": 4,
    "train.drop_epochs": [4, 8],
    "export.format": "none",
    "export.latency": [],
}
FAKETIME = "faketime/libfaketimeMT.so.1"
DISK_MB = 256
SAME = "the same"
ROUNDING = 1e-5
"""A part of a loss: memory that is short leads to parts of one to three images, for which sums are made otherwise."""


@dataclass(frozen=True)
class Outcome:
    """What came of an injection: the seconds to the next event."""

    fault: str
    event: str
    seconds: float


@dataclass(frozen=True)
class Strike:
    """A fault that happens `delay` seconds after an event of the journal, counted from 0."""

    event: int
    delay: float
    fault: str


def drawn(
    kinds: list[str], gaps: list[float], count: int, names: list[str], before: Counter[str], draw: random.Random
) -> list[Strike]:
    """Faults in order of events: those first that have happened least `before`."""
    chosen: list[Strike] = []
    used = Counter(before)
    for _ in range(count):
        name = min(draw.sample(names, len(names)), key=lambda name: used[name])
        used[name] += 1
        event = draw.choice(_usable(kinds, name))
        chosen.append(Strike(event, draw.uniform(0, gaps[event]), name))
    return sorted(chosen, key=lambda strike: (strike.event, strike.delay))


def at_every(kinds: list[str], gaps: list[float], name: str, draw: random.Random) -> list[Strike]:
    """One fault before every event that it can come before."""
    return [Strike(event, draw.uniform(0, gaps[event]), name) for event in _usable(kinds, name)]


def _usable(kinds: list[str], name: str) -> list[int]:
    before = FAULTS[name].before
    return [event for event in range(len(kinds) - 1) if before == ANY or kinds[event + 1] in before]


def disturbed(run: Run, strikes: list[Strike], kinds: list[str], draw: random.Random) -> Iterator[Outcome]:
    """Carries out a run with its faults. `kinds` are the events of the undisturbed run."""
    for strike in strikes:
        run.wait(lambda strike=strike: _is_due(run, strike, kinds) or run.finished, f"before {strike.fault}")
        if run.finished:
            break
        time.sleep(strike.delay)
        there = len(run.events())
        run.mark()
        began = time.time()
        if (
            run.driver.poll() is not None
            or not _may_happen(strike.fault, there, kinds)
            or not FAULTS[strike.fault].happens(run, draw)
        ):
            print(f"      {strike.fault}: not possible at this moment, or without effect", flush=True)
            continue
        there = min(there, len(run.events()))
        if run.struck is not None:
            there, began = run.struck
            if not _may_happen(strike.fault, there, kinds):
                print(f"      {strike.fault}: too late to have an effect", flush=True)
                continue
        run.wait(lambda there=there: len(run.events()) > there or run.finished, f"after {strike.fault}")
        outcome = Outcome(strike.fault, kinds[there - 1], _seconds_to_the_next(run, began))
        print(
            f"      {outcome.seconds:6.1f} s  {strike.fault}, {strike.delay:.1f} s after event {there - 1}", flush=True
        )
        yield outcome
    run.wait(lambda: run.finished, "to the end")


def _is_due(run: Run, strike: Strike, kinds: list[str]) -> bool:
    there = len(run.events())
    return there > strike.event and _may_happen(strike.fault, there, kinds)


def _may_happen(fault: str, there: int, kinds: list[str]) -> bool:
    """Whether the fault may come before the event that follows the first `there` ones."""
    before = FAULTS[fault].before
    return there < len(kinds) and (before == ANY or kinds[there] in before)


def verdict_of(run: RunFolder, peace: RunFolder, strikes: list[Strike]) -> str:
    """Whether a run has the decisions, the plan and the weights of the undisturbed one, to the last bit.

    Where a search worker was short of memory, losses may differ by ROUNDING; it is said by how much.
    """
    found, expected = run.outcome(), peace.outcome()
    if found == expected:
        return SAME
    rounding = _rounding(run.decisions(), peace.decisions())
    if (
        any(strike.fault == MEMORY_SHORT for strike in strikes)
        and found == {**expected, "decisions": found["decisions"]}
        and rounding <= ROUNDING
    ):
        return f"{SAME}, but for {rounding:.0e} of a loss (memory was short)"
    return f"DIFFERENT: {found}, expected {expected}"


def _rounding(found: list[dict[str, typing.Any]], expected: list[dict[str, typing.Any]]) -> float:
    """The largest difference of a loss, as a part of it; infinite if anything else differs."""
    most = 0.0
    for one, other in itertools.zip_longest(found, expected, fillvalue={}):
        losses = ("loss", "loss_before")
        if {**one, **dict.fromkeys(losses)} != {**other, **dict.fromkeys(losses)}:
            return math.inf
        most = max(most, *(abs(one[key] - other[key]) / abs(other[key]) for key in losses))
    return most


def _seconds_to_the_next(run: Run, began: float) -> float:
    """Seconds from `began` to the first event after it: to now where the driver's clock was moved."""
    later = [at for at in run.folder.times() if at > began]
    return round((later[0] if later else time.time()) - began, 1)


@contextlib.contextmanager
def placed(cluster: hosts.Hosts, mode: Mode) -> Iterator[Place]:
    """Where the runs of a mode are stored."""
    if mode == "s3":
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
        with s3_store(cluster.folder / "weed", host=hosts.BRIDGE) as store:
            yield Place(store.uri("runs"), store.uri("runs", around=True), proxy=store.proxy)
        return
    disk = cluster.folder / "runs"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], check=True)
    try:
        yield Place(str(disk), str(disk), disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def environment_of(cluster: hosts.Hosts, mode: Mode) -> Mapping[str, str]:
    """The driver's environment."""
    if mode != "clock":
        return {}
    library = next(Path("/usr/lib").glob(f"*/{FAKETIME}"), None)
    if library is None:
        raise SystemExit("libfaketime is not installed (Debian's package faketime)")
    clock = cluster.folder / "clock"
    clock.write_text("+0h\n")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=typing.get_args(Mode), default="plain")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--faults", type=int, default=8, help="faults a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(FAULTS), metavar="FAULT", help="these faults only")
    parser.add_argument("--every", choices=sorted(FAULTS), metavar="FAULT", help="this fault before every event")
    parser.add_argument("--out", type=Path, help="a file for the outcomes, a JSON line a run; a file that exists grows")
    parser.add_argument("--table", type=Path, metavar="FILE", help="prints the table of such a file, and does nothing")
    options = parser.parse_args()
    if options.table is not None:
        report(_lines(options.table))
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # either ends the hosts, too, in the background as well
        signal.signal(number, signal.default_int_handler)
    reason = hosts.missing()
    if reason is not None:
        raise SystemExit(reason)
    print(machine("ray"))
    mode: Mode = options.mode
    names = options.only or [name for name, fault in FAULTS.items() if mode in fault.modes]
    wrong = [name for name in names if mode not in FAULTS[name].modes]
    if wrong:
        raise SystemExit(f"{wrong[0]} does not happen in mode {mode}, but in {', '.join(FAULTS[wrong[0]].modes)}")
    lines: list[dict[str, typing.Any]] = []
    earlier = _lines(options.out)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(hosts.Hosts(keeps_state=mode == "kept state", dashboard=mode == "jobs"))
        place = stack.enter_context(placed(cluster, mode))
        environment = environment_of(cluster, mode)
        cluster.up()
        began = time.monotonic()
        peace = Run(cluster, place, "peace", SETTINGS, mode == "jobs", environment)
        peace.wait(lambda: peace.finished, "the undisturbed run")
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        kinds = peace.events()
        gaps = [max(0.0, after - before) for before, after in itertools.pairwise(peace.folder.times())]
        for number in range(len(earlier), len(earlier) + options.runs):
            draw = random.Random(f"{options.seed}/{number}")
            for host in (0, *cluster.workers):
                if host not in cluster.alive():
                    cluster.kill(host)
                    cluster.start(host)
            run = Run(cluster, place, f"run{number}", SETTINGS, mode == "jobs", environment)
            print(f"run {number}", flush=True)
            so_far = Counter(row["fault"] for line in earlier + lines for row in line["outcomes"])
            strikes = (
                at_every(kinds, gaps, options.every, draw)
                if options.every
                else drawn(kinds, gaps, options.faults, names, so_far, draw)
            )
            outcomes: list[Outcome] = []
            try:
                outcomes.extend(disturbed(run, strikes, kinds, draw))
                verdict = verdict_of(run.folder, peace.folder, strikes)
            except (HungError, subprocess.TimeoutExpired) as error:
                verdict = f"FAILED: {error}"
                run.kill_driver()
            print(f"      decisions, plan and weights: {verdict}", flush=True)
            rows = [dataclasses.asdict(outcome) for outcome in outcomes]
            line = {"run": number, "mode": mode, "machine": machine("ray"), "outcomes": rows, "verdict": verdict}
            lines.append(line)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    report(lines)
    if not all(line["verdict"].startswith(SAME) for line in lines):
        sys.exit(1)


def _lines(file: Path | None) -> list[dict[str, typing.Any]]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def report(lines: list[dict[str, typing.Any]]) -> None:
    """Prints the table of docs/faults.md."""
    seconds = defaultdict(list)
    for line in lines:
        for row in line["outcomes"]:
            seconds[row["fault"]].append(row["seconds"])
    print("\n| fault | times | seconds to the next event: median | most |\n|---|---|---|---|")
    for name in FAULTS:
        if name in seconds:
            print(
                f"| {name} | {len(seconds[name])} | {statistics.median(seconds[name]):.0f} | {max(seconds[name]):.0f} |"
            )
    same = sum(line["verdict"].startswith(SAME) for line in lines)
    print(f"\n{sum(map(len, seconds.values()))} faults in {len(lines)} runs, {same} of which ended as undisturbed ones")
    for line in lines:
        if line["verdict"] != SAME:
            print(f"run {line['run']}: {line['verdict']}")


if __name__ == "__main__":
    main()
