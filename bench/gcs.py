"""Whether the memory of Ray's GCS, which keeps a history of tasks, ends growing.

    python bench/gcs.py [--tasks 250000] [--limit 10000] [--every 25000]

Submits trivial tasks of an actor, so few at a time that no record of them is dropped, on a cluster of this machine.
Prints the memory that the GCS has for itself, and whether it forgets old tasks by then. `--limit` is
RAY_task_events_max_num_task_in_gcs (Ray's default: 100,000).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import psutil
from machine import machine

BATCH, PAUSE_S = 500, 0.2
"""A process sends its records once a second and drops those beyond 10,000."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=250_000)
    parser.add_argument("--every", type=int, default=25_000)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.limit is not None:
        os.environ |= {"RAY_task_events_max_num_task_in_gcs": str(options.limit)}
    import ray  # after the environment is set

    print(machine("ray"))
    node = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

    @ray.remote
    class Actor:
        def nothing(self) -> None:
            pass

    actor = Actor.remote()
    ray.get(actor.nothing.remote())
    gcs = next(one for one in psutil.Process().children(recursive=True) if "gcs_server" in " ".join(one.cmdline()))
    log = Path(node.address_info["session_dir"]) / "logs" / "gcs_server.out"
    print("| tasks | GCS, MiB | forgets old tasks |\n|---|---|---|")
    for done in range(0, options.tasks + 1, BATCH):
        if done % options.every == 0:
            time.sleep(3)
            size = gcs.memory_full_info().uss / 2**20
            forgets = "yes" if "Max number of tasks event" in log.read_text() else "no"
            print(f"| {done:,} | {size:.0f} | {forgets} |", flush=True)
        began = time.monotonic()
        ray.get([actor.nothing.remote() for _ in range(BATCH)])
        time.sleep(max(0.0, PAUSE_S - (time.monotonic() - began)))
    ray.shutdown()


if __name__ == "__main__":
    main()
