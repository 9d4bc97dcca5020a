"""The events of a sweep's own journal, in its folder."""

from __future__ import annotations

from laasp_ray.run.events import RunStarted
from laasp_ray.store.journal import Journal, event_file
from laasp_ray.store.storage import Storage

STARTED, ENDED, FINISHED = "sweep", "trial", "result"
"""What the sweep was asked for; how a trial ended; what was found."""


_START = f"/{event_file(1, RunStarted.NAME)}"


def runs_in(folder: Storage) -> dict[str, Storage]:
    """The folders in `folder` that hold a run which has begun, by their names there: a trial's is SWEEP/TRIAL."""
    names = sorted({name.removesuffix(_START) for name in folder.list() if name.endswith(_START)})
    return {name: folder.child(name) for name in names}


def is_sweep(folder: Storage) -> bool:
    """Whether the folder is that of a sweep which has begun."""
    return Journal(folder).last(STARTED) is not None
