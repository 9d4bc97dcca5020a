"""A run on a cluster of hosts whose driver can be started, stopped, watched and started again."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hosts
import interruptions
from fault_proxy import FaultProxy
from run_folder import RunFolder

from laasp_ray.store.ownership import see_owner

LONG_S = 900.0
"""No recovery takes longer, or the run hangs."""
COMING_S = 60.0
"""A process that an earlier fault ended is waited for so long."""
_DRIVER = f"{sys.executable} {interruptions.ROOT / 'jobs' / 'prune.py'}"


class HungError(Exception):
    """The run makes no progress, ended when it should not have, or did not say why it ended."""


@dataclass(frozen=True)
class Place:
    """Where runs are stored. `uri` is the storage's address for a driver on a host, `seen_at` that for this process.

    `disk` is the local folder if it is one. `proxy` is between the driver and the store if it is none.
    """

    uri: str
    seen_at: str
    disk: Path | None = None
    proxy: FaultProxy | None = None


@dataclass
class Run:
    """A run of the digits' recipe. Its driver is on the head, or on the first worker if the head keeps its state.

    With `as_job` each start is a job of the cluster. `environment` is for the driver.
    """

    cluster: hosts.Hosts
    place: Place
    name: str
    settings: Mapping[str, object]
    as_job: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = 1 if self.cluster.keeps_state else 0
        self.log = self.cluster.folder / f"{self.name}.log"
        mark, query = self.place.seen_at.partition("?")[1:]
        self.folder = RunFolder(f"{self.place.seen_at.partition('?')[0].rstrip('/')}/{self.name}{mark}{query}")
        self.starts = 0
        self.struck: tuple[int, float] | None = None
        """After how many events, and when, a process got its signal, if the last fault is one."""
        self._marked = 0
        self.driver = self.start()

    @property
    def job(self) -> str:
        """The id of the last start's job."""
        return f"{self.name}-{self.starts}"

    def start(self) -> subprocess.Popen[bytes]:
        """Starts a driver: the first one, or the same command again."""
        self.starts += 1
        command = interruptions.command(self.place.uri, self.name, True, self.settings)
        if self.as_job:
            command = [*hosts.RAY, "job", "submit", f"--submission-id={self.job}", "--", *command]
        with self.log.open("ab") as file:
            return self.cluster.run(self.host, command, stdout=file, environment=self.environment)

    def again(self) -> None:
        self.driver = self.start()

    def events(self) -> list[str]:
        return self.folder.kinds()

    @property
    def finished(self) -> bool:
        return self.driver.poll() == 0

    @property
    def failed(self) -> bool:
        return self.driver.poll() not in (None, 0)

    def wait(self, condition: Callable[[], bool], what: str, allowed: tuple[subprocess.Popen[bytes], ...] = ()) -> None:
        """Waits for the condition. A driver that has ended with an error ends the wait, too, unless it is `allowed`."""
        deadline = time.monotonic() + LONG_S
        while not condition():
            if time.monotonic() > deadline:
                raise HungError(f"{what}: nothing for {LONG_S:g} s\n{self.said()}")
            if self.driver not in allowed and self.failed:
                raise HungError(f"{what}: the driver ended with {self.driver.returncode}\n{self.said()}")
            time.sleep(0.02 if self.place.proxy is None else 0.2)

    def wait_for_error(self, pattern: str) -> bool:
        """Waits until the driver ends with an error that says `pattern`. False if it ended without any before."""
        driver = self.driver
        self.wait(lambda: driver.poll() is not None, f"an error with {pattern!r}", allowed=(driver,))
        if self.finished:
            return False
        if re.search(pattern, self.said()) is None:
            raise HungError(f"the driver ended without {pattern!r}\n{self.said()}")
        return True

    def mark(self) -> None:
        """A fault is about to happen: what drivers said until now is not part of `said` any more."""
        self.struck = None
        self._marked = self.log.stat().st_size

    def said(self) -> str:
        """The end of what drivers said since the last mark."""
        with self.log.open("rb") as file:
            file.seek(self._marked)
            return file.read().decode(errors="replace")[-3000:]

    def process(self, title: str) -> int | None:
        """One process of the run on any host whose command line holds `title`.

        It may have to come up first, after an earlier fault. None if it does not before the next event, or COMING_S.
        """
        there, deadline = len(self.events()), time.monotonic() + COMING_S
        while True:
            found = [pid for host in self.cluster.alive() for pid in self.cluster.processes(host, title)]
            if found:
                return found[0]
            if len(self.events()) > there or time.monotonic() > deadline or self.driver.poll() is not None:
                return None
            time.sleep(0.5)

    def signal(self, title: str, number: int) -> bool:
        """A signal to one process of the run on any host; False if there is none."""
        pid = self.process(title)
        if pid is None:
            return False
        self.struck = len(self.events()), time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def drivers(self) -> list[int]:
        return [pid for pid in self.cluster.processes(self.host) if hosts.title_of(pid).startswith(_DRIVER)]

    def signal_driver(self, number: int) -> None:
        for pid in self.drivers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def worker_hosts(self) -> list[int]:
        """The workers that are alive and have no driver."""
        return [host for host in self.cluster.alive() if host not in (0, self.host)]

    def kill_driver(self) -> None:
        self.signal_driver(signal.SIGKILL)
        try:
            self.driver.wait(timeout=120)
        except subprocess.TimeoutExpired:  # a job's log is still followed
            self.driver.kill()
            self.driver.wait()

    @property
    def attempt(self) -> int:
        """The number of the last driver that took the run."""
        owner = see_owner(self.folder.storage)
        return 0 if owner is None else owner.token.attempt

    @property
    def released(self) -> bool:
        """Whether the last driver let the run go."""
        owner = see_owner(self.folder.storage)
        return owner is None or owner.left


def after(run: Run, seconds: float) -> None:
    """Waits for some seconds, or until the run is finished."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not run.finished:
        time.sleep(0.02)


Happens = Callable[[Run, random.Random], bool]
