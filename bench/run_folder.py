"""A run's folder as the benchmarks of faults see it: its events, and what must be the same in the end."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from laasp_ray.store.storage import Storage


class RunFolder:
    """The run in the folder `uri`. Events of faults are left out, because an undisturbed run has none."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage.open(uri)

    def files(self) -> list[str]:
        """The journal's files, in order."""
        names = self.storage.list("journal/")
        return [name for name in names if name.endswith(".json") and kind_of(name) != "fault"]

    def kinds(self) -> list[str]:
        return [kind_of(name) for name in self.files()]

    def times(self) -> list[float]:
        """The time of each event, seconds."""
        return [self.storage.read_json(name)["time"] for name in self.files()]

    def decisions(self) -> list[dict[str, Any]]:
        """What each iteration has chosen, and the losses that it measured of it."""
        names = [name for name in self.files() if kind_of(name) == "iteration"]
        return [self.storage.read_json(name)["data"]["decision"] for name in names]

    def outcome(self) -> dict[str, str]:
        """Digests of decisions, plan and weights of a finished run."""
        decisions = self.decisions()
        files = {"plan": "pruned/plan.json", "weights": "pruned/model.safetensors"}
        return {
            "decisions": f"{len(decisions)}: {_digest(json.dumps(decisions).encode())}",
            **{key: _digest(self.storage.read(name)) for key, name in files.items()},
        }


def kind_of(file: str) -> str:
    """The event's name in the name of its file."""
    return file.rpartition("/")[2].removesuffix(".json").split("-", 1)[1]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
