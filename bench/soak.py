"""Prunes for some time on one cluster and records memory: of the driver, search workers, trainers and object store.

    python bench/soak.py [--minutes 40] [--out FILE.json] [--plot FILE.svg]

The run is ResNet-56 on the digits, a few filters an iteration, with fine-tuning in between, on a cluster that it starts
on this machine with two trainers. Memory is what a process has for itself (USS), summed over the processes of a kind.
The table compares the medians of the second and the last quarter of the time: what leaks grows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from interruptions import config_of
from machine import machine

from laasp_ray import errors, prune
from laasp_ray.run.events import EpochDone, Happening, IterationDone
from laasp_ray.run.state import RunState

EVERY_S = 5.0
KINDS = {
    "search workers": "ray::SearchWorker",
    "trainers": "ray::RayTrainWorker",
    "mailboxes": "ray::Mailbox",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}
STORE = "object store"
SOAK = {
    "prune.flops_reduction": 0.9,
    "prune.max_pruned": 0.95,
    "prune.step": 0.001,
    "prune.fine_tune_every": 0.02,
    "prune.fine_tune_epochs": 1,
    "train.epochs": 3,
    "train.prune_epoch": 2,
    "train.drop_epochs": [],
    "export.format": "none",
    "export.latency": [],
}


class EnoughError(errors.LaaspError):
    """The time is over."""


@dataclass
class Soak:
    """The samples (seconds, kind -> MiB), as an observer of the run that ends it when the time is over."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    iterations: int = 0
    epochs: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: Happening, state: RunState) -> None:
        self.iterations += isinstance(event, IterationDone)
        self.epochs += isinstance(event, EpochDone)
        if time.monotonic() - self.began > self.seconds:
            raise EnoughError("the time is over")

    def close(self) -> None:
        self._over.set()

    def watch(self) -> None:
        """Samples until closed."""
        while not self._over.wait(EVERY_S):
            self.samples.append((time.monotonic() - self.began, memory()))


def memory() -> dict[str, float]:
    """Kind of process -> MiB now."""
    driver = psutil.Process()
    found = {"driver": _own(driver), **dict.fromkeys(KINDS, 0.0)}
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for kind, part in KINDS.items():
            if part in title:
                found[kind] += _own(process)
    used = _store_bytes()
    return found if used is None else {**found, STORE: used / 2**20}


def _own(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / 2**20
    except psutil.Error:  # it has ended
        return 0.0


def _store_bytes() -> int | None:
    """What objects take in the object stores of the cluster; None before it is up."""
    import ray
    from ray._private import internal_api

    if not ray.is_initialized():
        return None
    try:
        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        return int(internal_api.get_memory_info_reply(state, timeout_seconds=10.0).store_stats.object_store_bytes_used)
    except Exception as error:  # a private interface of Ray: the other figures are worth having without it
        print(f"no figure of the object store: {error}", flush=True)
        return None


def series(samples: list[tuple[float, dict[str, float]]], kind: str) -> tuple[list[float], list[float]]:
    """Seconds and MiB of a kind, where it was there."""
    there = [(at, found[kind]) for at, found in samples if found.get(kind)]
    return [at for at, _ in there], [size for _, size in there]


def table(soak: Soak) -> str:
    rows = ["| memory, MiB | second quarter, median | last quarter, median | most |", "|---|---|---|---|"]
    end = soak.samples[-1][0]
    for kind in ("driver", *KINDS, STORE):
        at, sizes = series(soak.samples, kind)
        early = [size for second, size in zip(at, sizes, strict=True) if end / 4 < second <= end / 2]
        late = [size for second, size in zip(at, sizes, strict=True) if second > end * 3 / 4]
        if early and late:
            rows.append(
                f"| {kind} | {statistics.median(early):.0f} | {statistics.median(late):.0f} | {max(sizes):.0f} |"
            )
    return "\n".join(rows)


def plot(soak: Soak, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in ("driver", *KINDS, STORE):
        at, sizes = series(soak.samples, kind)
        axes.plot([second / 60 for second in at], sizes, ".", markersize=2, label=kind)
    axes.set(
        xlabel="minutes", ylabel="MiB", title=f"{soak.iterations} iterations, {soak.epochs} epochs", ylim=(0, None)
    )
    axes.legend(markerscale=5)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, help="a JSON file for the samples")
    parser.add_argument("--plot", type=Path, help="a picture of them (SVG, PNG)")
    options = parser.parse_args()
    print(machine("ray"))
    soak = Soak(options.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), "soak", SOAK, "resnet56_cifar10")
        thread = threading.Thread(target=soak.watch, daemon=True)
        thread.start()
        try:
            prune(config, progress=soak)
            print("the run ended before the time was over")
        except EnoughError as end:
            print(end)
        finally:
            soak.close()
            thread.join()
    minutes = soak.samples[-1][0] / 60
    print(f"{soak.iterations} iterations and {soak.epochs} epochs in {minutes:.0f} minutes\n\n{table(soak)}")
    if options.out is not None:
        rows = [{"seconds": round(at, 1), **{k: round(v, 1) for k, v in found.items()}} for at, found in soak.samples]
        summary = {"machine": machine("ray"), "iterations": soak.iterations, "epochs": soak.epochs}
        options.out.write_text(json.dumps({**summary, "samples": rows}))
    if options.plot is not None:
        plot(soak, options.plot)


if __name__ == "__main__":
    main()
