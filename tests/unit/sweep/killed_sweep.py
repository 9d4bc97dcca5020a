"""A sweep whose driver is killed at drawn moments and started again, as a program: the killed are its children.

    python killed_sweep.py FOLDER GOAL KILLS SEED

FOLDER has `images`. The sweep without a kill is `peace`, the other one `killed`. Prints the number of lives that were
killed. Everything is imported once, before the first child.
"""

import dataclasses
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path

from fakes import Silent
from whole_runs import on_pictures

from laasp_ray.store.storage import Storage
from laasp_ray.sweep import in_process
from laasp_ray.sweep.goals import MaxDrop, SpaceSearch, Targets
from laasp_ray.sweep.run import run_sweep

GOALS = {
    "targets": Targets((0.06, 0.09, 0.12)),
    "max-drop": MaxDrop(50.0),
    "space": SpaceSearch((0.06,), {"train.learning_rate": {"loguniform": [0.01, 0.1]}}, 3),
}
MOST_LATE_S = 0.2


def sweep(folder: Path, name: str, goal: str) -> None:
    in_process._progress = lambda trial: Silent()
    config = dataclasses.replace(on_pictures(folder, folder / "images"), name=name)
    run_sweep(config, GOALS[goal], distributed=False, say=lambda line: None)


class Changes:
    """Counts what this process changes in any store. After `last` changes and `late` seconds more, it is killed."""

    def __init__(self, last: int, late: float) -> None:
        self.count, self._last, self._late = 0, last, late
        do = Storage._do

        def counted(storage, what, name, action, *, changes=False):
            self.count += changes
            if self.count == self._last:
                threading.Timer(self._late, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return do(storage, what, name, action, changes=changes)

        Storage._do = counted


def life(folder: Path, name: str, goal: str, last: int = -1, late: float = 0.0) -> tuple[int, int]:
    """Runs the sweep in a child; the child's status (-9: killed) and how often it changed a store."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            changes = Changes(last, late)
            sweep(folder, name, goal)
            os.write(writing, str(changes.count).encode())
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or 0)


def main() -> None:
    folder, goal, kills, draw = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), random.Random(int(sys.argv[4]))
    status, changes = life(folder, "peace", goal)
    assert status == 0
    killed = 0
    while True:
        last = draw.randint(1, max(1, changes // kills)) if killed < kills else -1
        status, _ = life(folder, "killed", goal, last, draw.uniform(0, MOST_LATE_S))
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        killed += 1
    print(killed)


if __name__ == "__main__":
    main()
