"""Scalars for TensorBoard, written to local files that are copied into `tensorboard/` of the run's folder."""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from laasp_ray.config import TARGETS
from laasp_ray.records import Metrics, RunState
from laasp_ray.run.events import BaselineMeasured, EpochDone, Happening, IterationDone, TrainingPhaseDone
from laasp_ray.store.storage import Storage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_FOLDER = "tensorboard"

_SYNC_S = 300
"""The seconds between two copies into the run's folder during a long training phase. Each copy adds files."""


class ScalarWriter:
    """The scalars of a run. Each `sync` adds files to the run's folder and changes none; this also holds for a resumed
    run.

    Scalars that are not synced when the process ends are lost, but the journal has their values.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.brief().child(_FOLDER)
        self._troubled = False
        self._scratch = tempfile.TemporaryDirectory(prefix="laasp_ray-tensorboard-")
        self._writer: SummaryWriter | None = None
        self._synced = time.monotonic()

    def on_event(self, event: Happening, state: RunState) -> None:
        """Writes what is worth a curve, and copies it into the run's folder every so often. What goes wrong is logged,
        once until it works again: curves never end a run."""
        try:
            self._draw(event, state)
        except Exception as error:
            if not self._troubled:
                logger.warning("TensorBoard's files could not be written, they are tried again later: %s", error)
            self._troubled = True

    def _draw(self, event: Happening, state: RunState) -> None:
        match event:
            case EpochDone():
                done = event.epochs_trained
                self.scalar("train/loss", event.loss, done)
                if event.top1 is not None:
                    self.scalar("train/top1", event.top1, done)
                self.scalar("learning_rate", event.learning_rate, done)
                if event.metrics is not None:
                    self._plot(event.metrics, done)
                self.sync(at_most_every=_SYNC_S)
            case IterationDone() if event.decision is not None:
                self.scalar("prune/loss", event.decision.loss, event.iteration)
                for of in {"FLOPs": 0.0, **event.reached}:
                    self.scalar(f"prune/{TARGETS[of]}", state.reached[of], event.iteration)
            case BaselineMeasured():
                self._plot(event.metrics, state.epochs_trained)
            case TrainingPhaseDone():
                self._plot(event.metrics, state.epochs_trained)
                self.sync()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """`tag` is, for example, `train/loss`. `step` is the number of an epoch or an iteration."""
        if self._writer is None:
            self._writer = self._next_writer()
        self._writer.add_scalar(tag, value, step)

    def sync(self, *, at_most_every: float = 0.0) -> None:
        """Copies new files into the run's folder, unless the last copy is less than `at_most_every` seconds old.

        Raises StoreError if that fails.
        """
        if self._writer is None or time.monotonic() - self._synced < at_most_every:
            return
        self._synced = time.monotonic()
        self._writer.close()
        self._writer = None
        for file in sorted(Path(self._scratch.name).iterdir()):
            self._storage.write_new(file.name, file.read_bytes())
            file.unlink()
        self._troubled = False

    def close(self) -> None:
        """Syncs, then removes the local files."""
        try:
            self.sync()
        finally:
            self._scratch.cleanup()

    def _plot(self, metrics: Metrics, step: int) -> None:
        for key, value in {"loss": metrics.loss, **metrics.named}.items():
            self.scalar(f"test/{key}", value, step)

    def _next_writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # this import takes a second, and only a run needs it

        # SummaryWriter's own file names hold second, host and process id, which restarted containers may share.
        return SummaryWriter(self._scratch.name, filename_suffix=f".{uuid.uuid4().hex}")
