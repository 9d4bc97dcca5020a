"""Whole runs in this process: on tiny pictures, and cut off at an event of the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import small_run

from laasp_ray.config import RunConfig
from laasp_ray.run.events import RunEvent, read_events
from laasp_ray.store.journal import Event, Journal
from laasp_ray.store.storage import Storage


def on_pictures(storage: Path, pictures: Path, **changes: Any) -> RunConfig:
    """`small_run` on a folder of three classes' pictures, at 8 x 8."""
    settings = {
        "data__path": str(pictures),
        "data__format": "folder",
        "data__loader": "torchvision",
        "data__image_size": 8,
        "data__eval_resize": 8,
        "model__input_shape": [3, 8, 8],
        "model__arguments": {"num_classes": 3},
        "train__batch_size": 6,
        "search__images": 6,
    }
    if changes.get("prune__method", "laasp") == "laasp":
        settings["prune__criteria"] = ["l1"]
    return small_run(storage, **(settings | changes))


def on_digits(storage: Path, digits: Path, **changes: Any) -> RunConfig:
    """`small_run` on a folder of three classes' handwritten digits at 16 x 16 (`helpers.write_digits`)."""
    settings = {
        "data__path": str(digits),
        "data__format": "folder",
        "model__arguments": {"num_classes": 3},
        "train__batch_size": 20,
    }
    return small_run(storage, **(settings | changes))


def events_of(config: RunConfig) -> list[Event]:
    return Journal(Storage.open(config.storage).child(config.name)).events()


class PowerCutError(Exception):
    pass


def read_events_of(config: RunConfig) -> list[RunEvent]:
    return read_events(Journal(Storage.open(config.storage).child(config.name)))


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, position: int) -> Iterator[None]:
    """The power fails when the journal's event `position` is about to be written, all work for it done.

    To fail just after an event would leave the same store behind, but for the work that is then done twice.
    """
    append = Journal.append

    def failing(journal: Journal, name: str, data: Any) -> Event:
        if len(journal.events()) == position:
            raise PowerCutError
        return append(journal, name, data)

    with monkeypatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(Journal, "append", failing)
        yield
