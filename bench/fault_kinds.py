"""The faults that bench/faults.py injects. Each is a function of a run; False means that it was not possible."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hosts
from disturbed_run import LONG_S, Happens, HungError, Run, after
from fault_proxy import EXPIRED, FULL, SLOW_DOWN, Policy
from run_folder import kind_of

Mode = Literal["plain", "kept state", "s3", "jobs", "clock"]
"""What a cluster is set up for: nothing else, a head that keeps its state, runs on S3, drivers that are jobs, drivers
whose clock can be moved.
"""
TRAINING, SEARCH, ANY = ("epoch", "training_phase"), ("iteration",), ()
MEMORY_SHORT = "search worker short of memory"
SHORT = 256 << 20
"""Bytes of address space that a search worker lacks when its memory is short."""
_WRITES = ("PUT", "POST")
_FILLER = """
import ray, numpy, time
ray.init(log_to_driver=False)
held = []
for _ in range(9):
    reference = ray.put(numpy.zeros(10 << 20, numpy.uint8))
    held.append((reference, ray.get(reference)))
print("filled", flush=True)
time.sleep(15)
"""
"""Fills a node's object store with objects that are in use and cannot be spilled."""


@dataclass(frozen=True)
class Fault:
    """`before` are the kinds of event that must come next; none: any."""

    happens: Happens
    before: tuple[str, ...] = ANY
    modes: tuple[Mode, ...] = ("plain", "kept state", "s3")


def of_process(title: str, number: int) -> Happens:
    return lambda run, draw: run.signal(title, number)


def driver_killed(run: Run, draw: random.Random) -> bool:
    run.kill_driver()
    run.again()
    return True


def driver_terminated(run: Run, draw: random.Random) -> bool:
    run.signal_driver(signal.SIGTERM)
    run.driver.wait(timeout=60)
    run.again()
    return True


def job_stopped(run: Run, draw: random.Random) -> bool:
    """`ray job stop`: SIGTERM, and SIGKILL three seconds later. The driver must have let the run go by then."""
    if not run.drivers():
        return False
    stop = run.cluster.run(run.host, [*hosts.RAY, "job", "stop", run.job], stdout=subprocess.DEVNULL)
    stop.wait(timeout=120)
    run.driver.wait(timeout=120)
    if not run.released:
        raise HungError(f"the job that was stopped did not let the run go\n{run.said()}")
    run.struck = len(run.events()), time.time()  # until now the driver may still have written an event
    run.again()
    return True


def driver_wakes(run: Run, draw: random.Random) -> bool:
    """The driver is stopped, another takes over, and the first one wakes."""
    first = run.drivers()
    for pid in first:
        os.kill(pid, signal.SIGSTOP)
    old, attempt = run.driver, run.attempt
    run.again()
    run.wait(lambda: run.attempt > attempt, "another driver takes over", allowed=(old,))
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    old.send_signal(signal.SIGCONT)  # nsenter, which started the driver, stops when it does
    deadline = time.monotonic() + LONG_S  # it finds out when it next writes
    while old.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if old.poll() in (None, 0):
        raise HungError("the driver that woke up ended as if it had the run")
    return True


def two_drivers(run: Run, draw: random.Random) -> bool:
    """A second driver is started: one of the two is refused, as a rule the second, and the other has the run."""
    first, second = run.driver, run.start()
    run.driver = second  # both may have to wait until an earlier owner is known to be dead
    run.wait(lambda: first.poll() is not None or second.poll() is not None, "two drivers", allowed=(first, second))
    refused = second if second.poll() not in (None, 0) else first
    run.driver = first if refused is second else second
    if refused.poll() == 0:  # the run was finished before the second looked
        run.driver.wait(timeout=LONG_S)
        return False
    if "another driver has" not in run.said():
        raise HungError(f"the driver that was refused did not say why\n{run.said()}")
    return True


def host_lost(run: Run, draw: random.Random) -> bool:
    """A worker host is gone for good."""
    alive = run.worker_hosts()
    if len(run.cluster.alive()) < 3 or not alive:
        return False
    run.cluster.kill(draw.choice(alive))
    return True


def host_returns(run: Run, draw: random.Random) -> bool:
    """A worker host loses its power and comes back."""
    alive = run.worker_hosts()
    if len(run.cluster.alive()) < 3 or not alive:
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
    time.sleep(2)
    if host not in run.cluster.alive():  # Ray gave it up: somebody starts it again
        run.cluster.kill(host)
        run.cluster.start(host)
    return True


def head_lost(run: Run, draw: random.Random) -> bool:
    """The head is lost with the driver; a new cluster is started, and the same command is given again."""
    for host in run.cluster.alive():
        run.cluster.kill(host)
    run.driver.wait()
    run.cluster.up()
    run.again()
    return True


def head_returns(run: Run, draw: random.Random) -> bool:
    """The head loses its power for 10 s and comes back with the cluster's state; the driver is elsewhere."""
    run.cluster.kill(0)
    time.sleep(10)
    run.cluster.start(0)
    return True


def torn_event(run: Run, draw: random.Random) -> bool:
    """The driver dies, and the journal's last event is cut off."""
    run.kill_driver()
    storage = run.folder.storage
    last = max(name for name in storage.list("journal/") if name.endswith(".json"))
    content = storage.read(last)
    storage.write(last, content[: draw.randrange(len(content) // 2)])
    run.again()
    return True


def damaged_checkpoint(change: Callable[[Path], None]) -> Happens:
    """The driver dies, and the last checkpoint is damaged. The same command names it; then it is restored."""

    def happens(run: Run, draw: random.Random) -> bool:
        assert run.place.disk is not None
        run.kill_driver()
        epochs = [file for file in run.folder.files() if kind_of(file) == "epoch"]
        if not epochs:
            run.again()
            return False
        name = run.folder.storage.read_json(epochs[-1])["data"]["checkpoint"]
        last = run.place.disk / run.name / "checkpoints" / f"{name}.safetensors"
        kept = last.read_bytes()
        change(last)
        run.again()
        if not run.wait_for_error(re.escape(last.name)):
            raise HungError(f"the damaged {last.name} was not noticed\n{run.said()}")
        last.write_bytes(kept)
        run.again()
        return True

    return happens


def memory_short(run: Run, draw: random.Random) -> bool:
    """A search worker gets no more memory for seconds. It measures less at once, fails with the remedy, or dies.

    False if it asked for none in that time.
    """
    pid = run.process("ray::SearchWorker")
    if pid is None:
        return False
    there, driver = len(run.events()), run.driver
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        sizes = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize")]
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        # Below what it has, or it could give memory back and take as much again.
        resource.prlimit(pid, resource.RLIMIT_AS, (max(0, sizes[0] - SHORT) if sizes else hard, hard))
        time.sleep(draw.uniform(1, 4))
        resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
    run.wait(lambda: driver.poll() is not None or len(run.events()) > there, "memory is short", (driver,))
    noticed = "memory" in run.said() or not hosts.title_of(pid)
    if run.failed:
        if "memory" not in run.said():
            raise HungError(f"an error without the word memory\n{run.said()}")
        run.again()
    return noticed


def object_store_full(run: Run, draw: random.Random) -> bool:
    """Another job fills the object store of a host for 15 s with what it uses."""
    host = draw.choice(run.cluster.alive())
    log = run.cluster.folder / "filler.log"
    with log.open("wb") as file:
        filler = run.cluster.run(host, [sys.executable, "-c", _FILLER], stdout=file)
    return filler.wait(timeout=LONG_S) == 0 and "filled" in log.read_text()


def disk_full(run: Run, draw: random.Random) -> bool:
    """The storage's disk is full until the driver has ended; then there is room again."""
    assert run.place.disk is not None
    filler, block = run.place.disk / "filler", bytes(1 << 16)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(block)
    try:
        failed = run.wait_for_error("it is full")
    finally:
        filler.unlink()
    if failed:
        run.again()
    return failed


def other_images(run: Run, draw: random.Random) -> bool:
    """A worker host gets another copy of a class of the images, and a rank dies. The error names the host."""
    alive = run.worker_hosts()
    if not alive or run.process("ray::RayTrainWorker") is None:
        return False
    host, folder = draw.choice(alive), run.cluster.folder / "cache" / "digits-v1" / "train" / "3"
    other = run.cluster.folder / "other"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    next(other.iterdir()).unlink()
    run.cluster.mount(host, other, folder)
    try:
        run.signal("ray::RayTrainWorker", signal.SIGKILL)
        failed = run.wait_for_error(rf"different images: .*{hosts.address(host)} \(|{hosts.address(host)}.*images")
    finally:
        run.cluster.unmount(host, folder)
    if failed:
        run.again()
    return failed


def clock_back(run: Run, draw: random.Random) -> bool:
    """The driver's clock goes back an hour; an event that comes later has the time of an hour ago."""
    clock, there = Path(run.environment["FAKETIME_TIMESTAMP_FILE"]), len(run.events())
    hours = int(clock.read_text().rstrip("h\n")) - 1
    aside = clock.with_suffix(".new")
    aside.write_text(f"{hours:+d}h\n")
    aside.replace(clock)

    def is_moved() -> bool:
        return len(run.events()) > there and abs(run.folder.times()[-1] - time.time() - hours * 3600) < 600

    run.wait(lambda: is_moved() or run.finished, "an event at another time")  # the driver looks at the file each second
    return is_moved()


def breaking(make: Callable[[random.Random], Policy], seconds: float) -> Happens:
    """The store's answers follow a policy for some seconds; the run must go on by itself."""

    def happens(run: Run, draw: random.Random) -> bool:
        assert run.place.proxy is not None
        run.place.proxy.set(make(draw))
        after(run, seconds)
        broken = run.place.proxy.broken
        run.place.proxy.set(None)
        return broken > 0

    return happens


def refusing(policy: Policy, error: str) -> Happens:
    """The store refuses until the driver has ended with an error; then it is mended, and the same command given."""

    def happens(run: Run, draw: random.Random) -> bool:
        assert run.place.proxy is not None
        run.place.proxy.set(policy)
        try:
            failed = run.wait_for_error(error)
        finally:
            run.place.proxy.set(None)
        if failed:
            run.again()
        return failed

    return happens


def _tenth_write(draw: random.Random) -> Policy:
    """Every tenth write fails, in one of three ways."""
    count = 0

    def policy(method: str, path: str, number: int) -> object:
        nonlocal count
        count += method in _WRITES
        return draw.choice([SLOW_DOWN, "reset", "lost"]) if method in _WRITES and count % 10 == 0 else None

    return policy  # type: ignore[return-value]


FAULTS: dict[str, Fault] = {
    "search worker killed": Fault(of_process("ray::SearchWorker", signal.SIGKILL), SEARCH),
    "rank killed": Fault(of_process("ray::RayTrainWorker", signal.SIGKILL), TRAINING),
    "mailbox killed": Fault(of_process("ray::Mailbox", signal.SIGKILL), TRAINING),
    "rank stopped": Fault(of_process("ray::RayTrainWorker", signal.SIGSTOP), TRAINING),
    "search worker stopped": Fault(of_process("ray::SearchWorker", signal.SIGSTOP), SEARCH),
    "mailbox stopped": Fault(of_process("ray::Mailbox", signal.SIGSTOP), TRAINING),
    "driver killed": Fault(driver_killed),
    "driver terminated": Fault(driver_terminated),
    "`ray job stop`": Fault(job_stopped, modes=("jobs",)),
    "driver stopped, wakes after another took over": Fault(driver_wakes),
    "two drivers at once": Fault(two_drivers),
    "worker host lost for good": Fault(host_lost),
    "worker host lost, comes back": Fault(host_returns),
    "worker host off the network for 20 s": Fault(host_cut_off),
    "worker host with other images": Fault(other_images, TRAINING, modes=("plain",)),
    "head and driver lost": Fault(head_lost, modes=("plain", "s3")),
    "head lost, comes back with its state": Fault(head_returns, modes=("kept state",)),
    MEMORY_SHORT: Fault(memory_short, SEARCH),
    "object store full for 15 s": Fault(object_store_full),
    "driver's clock back an hour": Fault(clock_back, modes=("clock",)),
    "last event torn": Fault(torn_event),
    "last checkpoint cut off": Fault(
        damaged_checkpoint(lambda file: os.truncate(file, file.stat().st_size // 2)), modes=("plain",)
    ),
    "last checkpoint gone": Fault(damaged_checkpoint(Path.unlink), modes=("plain",)),
    "disk full": Fault(disk_full, modes=("plain",)),
    "every tenth write fails for 30 s": Fault(breaking(_tenth_write, 30), modes=("s3",)),
    "store gone for 30 s": Fault(breaking(lambda draw: lambda *_: "reset", 30), modes=("s3",)),
    "store full": Fault(refusing(lambda method, *_: FULL if method in _WRITES else None, "it is full"), modes=("s3",)),
    "credentials expire": Fault(refusing(lambda *_: EXPIRED, "credentials have expired"), modes=("s3",)),
}
