"""Several hosts on one machine, each with its own address and processes, as a Ray cluster with a head and workers.

A host is a network namespace and a process namespace, joined to the others by a bridge. Killing everything in it is a
power cut. It needs root on Linux, and the programs ip, unshare and nsenter. Everything that is made is taken down by
`close`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PORT = 6379
NETWORK = f"10.77.{os.getpid() % 256}"
"""Several benchmarks may run on one machine, each with a network of its own."""
BRIDGE = f"{NETWORK}.254"
"""This machine's own address, as the hosts see it."""
OBJECT_STORE_BYTES = 80_000_000
START_S = 180
STARTED = b"Ray runtime started"
"""The line of a `ray start` that has joined the cluster."""
HEAD_BACK_S = 600
"""Processes end if a head that keeps its state is away for so long. Ray's default of 60 s is short for a busy machine.
"""
VETH_PAUSE_S = 2.0
"""After its namespace is deleted a device's name is taken for about so long."""


def missing() -> str | None:
    """The reason why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts by network namespaces need root on Linux"
    programs = [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]
    return f"the programs {', '.join(programs)} are not installed" if programs else None


class Hosts:
    """A cluster of `workers` hosts with one CPU each and a head without any. All see the same files.

    With `keeps_state` the head writes the cluster's state to disk, and has it again when it comes back. With
    `dashboard` it accepts jobs.
    """

    def __init__(self, workers: int = 2, *, keeps_state: bool = False, dashboard: bool = False) -> None:
        self.keeps_state, self.dashboard = keeps_state, dashboard
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
        self._mounted = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets need a short path
        self._prefix = f"lr{os.getpid() % 10000}"
        self._token = secrets.token_hex(32)
        self._first: dict[int, subprocess.Popen[bytes]] = {}
        self.workers = range(1, workers + 1)
        _do("ip", "link", "add", f"{self._prefix}br", "type", "bridge")
        _do("ip", "addr", "add", f"{BRIDGE}/24", "dev", f"{self._prefix}br")
        _do("ip", "link", "set", f"{self._prefix}br", "up")

    def up(self) -> None:
        """Starts the head, then the workers."""
        for host in (0, *self.workers):
            self.start(host)

    def start(self, host: int) -> None:
        """Starts a host that is not there, with its part of the cluster. Host 0 is the head."""
        space, device = f"{self._prefix}h{host}", f"{self._prefix}v{host}"
        _do("ip", "netns", "add", space)
        _do("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "link", "set", device, "master", f"{self._prefix}br", "up")
        _do("ip", "-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        for name in ("eth0", "lo"):
            _do("ip", "-n", space, "link", "set", name, "up")
        own = self.folder / f"host{host}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        # Ray's folder has the same path on all hosts, and another content.
        script = f"mount --bind {own} {self._mounted}; exec sleep infinity"
        self._first[host] = subprocess.Popen(
            ["ip", "netns", "exec", space, "unshare", "-pf", "--mount-proc", "--kill-child", "sh", "-c", script],
            start_new_session=True,
        )
        _wait(lambda: bool(self._init_of(host)), 10, f"host {host} has no process")
        role = ["--head", "--num-cpus=0", f"--port={PORT}", "--disable-usage-stats"]
        role += [f"--include-dashboard={self.dashboard}"]
        if host:
            role = [f"--address={NETWORK}.1:{PORT}", "--num-cpus=1"]
        place = [f"--node-ip-address={address(host)}", f"--temp-dir={self._mounted}", "--block"]
        place += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        log = (self.folder / f"ray{host}.log").open("ab")
        began = time.monotonic()
        while True:
            at = log.tell()
            process = self.run(host, [*RAY, "start", *role, *place], stdout=log, environment=self._state_of(host))
            while process.poll() is None:
                if STARTED in Path(log.name).read_bytes()[at:]:
                    return
                if time.monotonic() - began > START_S:
                    break
                time.sleep(0.2)
            if time.monotonic() - began > START_S:
                raise RuntimeError(f"host {host} does not start: see {log.name}")

    def run(
        self, host: int, command: Sequence[str], stdout: object = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host."""
        inside = ["nsenter", "-t", str(self._init_of(host)), "-m", "-n", "-p", "-r", f"--wd={os.getcwd()}", *command]
        return subprocess.Popen(
            inside,
            stdout=stdout,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment, **(environment or {})},
            start_new_session=True,
        )

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment of a driver."""
        more = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_BACK_S)} if self.keeps_state else {}
        return {
            **more,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ADDRESS": f"{NETWORK}.1:{PORT}",
            "RAY_TMPDIR": str(self._mounted),
            "RAY_worker_niceness": "0",
            "LAASP_RAY_CACHE": str(self.folder / "cache"),
        }

    def _state_of(self, host: int) -> Mapping[str, str]:
        """Ray's settings for a head that keeps its state."""
        if host or not self.keeps_state:
            return {}
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "state")}

    def processes(self, host: int, title: str = "") -> list[int]:
        """The processes of a host, as this machine numbers them, whose command line holds `title`."""
        return [pid for pid in self._pids(host) if title in title_of(pid)]

    def kill(self, host: int) -> None:
        """A power cut: everything ends at once, and the host is gone."""
        for pid in self._pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first = self._first.pop(host, None)
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        _do("ip", "link", "del", f"{self._prefix}v{host}", check=False)
        _do("ip", "netns", "del", f"{self._prefix}h{host}", check=False)
        time.sleep(VETH_PAUSE_S)

    def cut(self, host: int, *, off: bool) -> None:
        """Takes a host off the network, or brings it back."""
        _do("ip", "link", "set", f"{self._prefix}v{host}", "down" if off else "up")

    def mount(self, host: int, folder: Path, place: Path) -> None:
        """Shows `folder` in `place` on one host only."""
        self.run(host, ["mount", "--bind", str(folder), str(place)]).wait()

    def unmount(self, host: int, place: Path) -> None:
        self.run(host, ["umount", "--lazy", str(place)]).wait()

    def alive(self) -> list[int]:
        """The hosts that are part of the cluster."""
        return sorted(host for host in self._first if self.processes(host, "raylet/raylet"))

    def close(self) -> None:
        for host in list(self._first):
            self.kill(host)
        _do("ip", "link", "del", f"{self._prefix}br", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._mounted, ignore_errors=True)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pids(self, host: int) -> list[int]:
        done = _do("ip", "netns", "pids", f"{self._prefix}h{host}", check=False)
        return [int(pid) for pid in done.split()]

    def _init_of(self, host: int) -> int:
        """The first process of a host's process namespace; 0 if there is none yet."""
        return next((pid for pid in self._pids(host) if title_of(pid).startswith("sleep infinity")), 0)


def address(host: int) -> str:
    return f"{NETWORK}.{host + 1}"


def title_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _wait(condition: object, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(0.05)


def _do(*command: str, check: bool = True) -> str:
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout
