"""Exports the network of a run that is over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.config.names import is_import_path
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.export.graph import planned_convolutions
from laasp_ray.export.network import Export, export_network
from laasp_ray.records import to_json
from laasp_ray.run.card import CARD, model_card
from laasp_ray.run.evaluate import check_runs_no_code, settings_of
from laasp_ray.run.events import (
    Happening,
    LatencyMeasured,
    NetworkExported,
    RunFinished,
    data_of,
    last_of,
    read_events,
)
from laasp_ray.run.finishing import Delivered
from laasp_ray.run.totals import exports_of, metrics_before
from laasp_ray.store.artifact import METRICS, load_pruned, pruned_folder, read_arch
from laasp_ray.store.journal import Journal, started_config
from laasp_ray.store.ownership import take
from laasp_ray.store.storage import Storage


def export_run(folder: str | Path, format: Literal["onnx", "torch"] = "onnx", *, trust: bool = False) -> Export:
    """Writes `pruned/model.onnx` (or `model.pt2`) of a finished run, and notes it in the journal, in `metrics.json` and
    in the model card.

    A builder that the folder names by import path is used only with `trust`, because that runs code. Raises ConfigError
    without it, StoreError if the folder holds no finished run, ExportError if the network cannot be exported or the
    file computes something else; nothing is written then.
    """
    storage = Storage.open(str(folder))
    journal = Journal(storage)
    if journal.last(RunFinished.NAME) is None:
        raise StoreError(
            f"{storage.uri} holds no finished run: give the folder of one, such as runs/resnet50_digits, or finish it "
            "first (the command that began it goes on with it)"
        )
    model = settings_of(storage).model
    if not trust:
        check_runs_no_code({"the network's builder": model.builder}, storage.uri)
    unpruned = models.build_offline(model)
    planned = planned_convolutions(unpruned, read_arch(storage).plan)
    made = export_network(load_pruned(storage, unpruned), model.input_shape, planned, format)
    owner = take(storage, at_least=journal.last_attempt() + 1)
    try:
        storage = storage.guarded(owner.ensure)
        event = NetworkExported(export=made.record)
        pruned_folder(storage).write(made.record.file, made.content)
        Journal(storage, owner).append(event.NAME, data_of(event))
        _note(storage, [*read_events(journal), event], trust=trust)
    finally:
        owner.release()
    return made.record


def _note(storage: Storage, events: Sequence[Happening], *, trust: bool) -> None:
    """Brings `metrics.json` and the model card up to date. A config of another version makes no card."""
    folder, exports = pruned_folder(storage), exports_of(events)
    metrics = {**folder.read_json(METRICS), "export": to_json(exports)}
    folder.write(METRICS, json.dumps(metrics, indent=1).encode())
    config = _whole_config(started_config(storage) or {}, trust=trust)
    if config is not None:
        timed = last_of(events, LatencyMeasured)
        made = Delivered(exports=exports, latency=() if timed is None else timed.rows)
        card = model_card(config, last_of(events, RunFinished), metrics_before(events), made)
        folder.write(CARD, card.encode())


def _whole_config(settings: Mapping[str, Any], *, trust: bool) -> RunConfig | None:
    """None if it is of another version, or names code that would run and is not trusted."""
    method = settings.get("prune", {}).get("method")
    if isinstance(method, str) and is_import_path(method) and not trust:
        return None
    try:
        return RunConfig.from_dict(settings)
    except ConfigError:
        return None
