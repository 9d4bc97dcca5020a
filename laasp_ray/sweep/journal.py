"""The events of a sweep's own journal, in its folder."""

from __future__ import annotations

from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

STARTED, ENDED, FINISHED = "sweep", "trial", "result"
"""What the sweep was asked for; how a trial ended; what was found."""


def is_sweep(folder: Storage) -> bool:
    """Whether the folder is that of a sweep which has begun."""
    return Journal(folder).last(STARTED) is not None
