"""Scalars for TensorBoard, written locally and copied into the run's folder, `tensorboard/`."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from laasp_ray.store.storage import Storage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FOLDER = "tensorboard"


class ScalarWriter:
    """The scalars of a run. Each `sync` adds files to the run's folder and changes none, on resuming too.

    Scalars that were not synced when the process ends are lost; the journal has them.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.child(_FOLDER)
        self._scratch = tempfile.TemporaryDirectory(prefix="laasp_ray-tensorboard-")
        self._writer: SummaryWriter | None = None
        self._synced = time.monotonic()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """`tag` as in `train/loss`; `step` is an epoch's or an iteration's number."""
        if self._writer is None:
            self._writer = self._next_writer()
        self._writer.add_scalar(tag, value, step)

    def sync(self, *, at_most_every: float = 0.0) -> None:
        """Copies what is new into the run's folder, unless that was done less than `at_most_every` seconds ago.

        Raises StoreError when that does not work.
        """
        if self._writer is None or time.monotonic() - self._synced < at_most_every:
            return
        self._synced = time.monotonic()
        self._writer.close()
        self._writer = None
        for file in sorted(Path(self._scratch.name).iterdir()):
            self._storage.write_new(file.name, file.read_bytes())
            file.unlink()

    def close(self) -> None:
        """Syncs, then removes the local files."""
        try:
            self.sync()
        finally:
            self._scratch.cleanup()

    def _next_writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second; runs that only read do without

        # The writer's own names hold second, host and process, which containers started over may share.
        return SummaryWriter(self._scratch.name, filename_suffix=f".{uuid.uuid4().hex}")
