"""The beginning of a run: its first event, its calibration images, and what a resumed run has to share with it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from laasp_ray.config.fields import flatten
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.examples.calibration import draw_calibration_examples
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.data.sources.identity import identify
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.methods import PruningMethod
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.run.events import CalibrationDrawn, RunStarted, data_of, read_event, started
from laasp_ray.run.machine import this_machine
from laasp_ray.run.preflight import Prepared, write_config
from laasp_ray.search.calibration import Drawn
from laasp_ray.store.addresses import public_data
from laasp_ray.store.checkpoint import UNPRUNED, has_checkpoint, load_checkpoint, save_checkpoint
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.tasks import Task

logger = logging.getLogger(__name__)


def check_method(start: RunStarted, method: PruningMethod[Any] | None) -> None:
    theirs, ours = start.method, _name_of(method)
    if theirs != ours:
        raise ConfigError(
            f"this run was started with {theirs or 'no method of its own'}, now it is given {ours or 'none'}: give the "
            "same method to go on with it, or start a run under another name"
        )


def _name_of(method: PruningMethod[Any] | None) -> str | None:
    if method is None:
        return None
    return f"{type(method).__module__}.{type(method).__qualname__}"


def batch_parts_of(journal: Journal) -> int | None:
    """The parts of a global batch as the run began. They decide what BatchNorm sees together, so they stay."""
    start = started(journal)
    return None if start is None else start.batch_parts


def start_run(
    prepared: Prepared,
    storage: Storage,
    journal: Journal,
    method: PruningMethod[Any] | None,
    parts: int,
    workers: str = "",
) -> None:
    """Stores the initial weights, writes the journal's first event, then config.json. `workers` says in words what the
    run is spread over.

    The weights are stored so that a resumed run does not depend on their source file. Their name is unique and
    config.json comes last: if two drivers start the same run at once, the slower one finds the other's event, and none
    of its own files is mistaken for the other's.
    """
    config, baseline = prepared.config, prepared.baseline
    settings = public_data(config.to_dict())
    begun_with = prepared.begun_with or capture(prepared.unpruned, Plan.empty())
    initial = f"initial-{uuid.uuid4().hex[:8]}"
    digests = save_checkpoint(storage, initial, model=begun_with.tensors)
    event = RunStarted(
        config=settings,
        method=_name_of(method),
        macs=baseline.macs.total,
        macs_convention=baseline.macs.convention,
        filters=baseline.filters,
        parameters=sum(parameter.numel() for parameter in prepared.unpruned.parameters()),
        step_sizes=baseline.step_sizes,
        layers=len(baseline.filters),
        skipped_layers=baseline.skipped,
        train_images=len(prepared.train),
        test_images=len(prepared.test),
        images={"train": _identity(prepared.train), "test": _identity(prepared.test)},
        task=prepared.task.identity(),
        checkpoint=initial,
        plan=None if begun_with.plan.is_empty else begun_with.plan.to_json(),
        batch_parts=parts,
        macs_by_layer=baseline.macs.per_layer,
        weight_shapes=baseline.macs.weight_shapes,
        machine=this_machine() | ({"workers": workers} if workers else {}),
        digests=digests,
    )
    journal.append(event.NAME, data_of(event))
    write_config(storage, config.to_dict())


def _identity(source: ImageSource | Examples) -> dict[str, Any]:
    return source.identity() if isinstance(source, Examples) else identify(source)


def check_same_task(start: RunStarted, task: Task) -> None:
    """Raises ConfigError if the run was started with another loss, data or metrics of the user's own."""
    if listed := differing_parts(start.task or {}, task.identity() or {}):
        raise ConfigError(
            f"this run was started with another task ({listed}): give the same data, loss and metrics to go on with "
            "it, or start a run under another name"
        )


def differing_parts(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The parts in which two tasks' identities differ, as a text; empty if they are the same. `theirs` is a run's."""
    theirs, ours = flatten(theirs), flatten(ours)
    differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    return "; ".join(f"{key}: {theirs.get(key, 'none')} there, {ours.get(key, 'none')} here" for key in differing)


def keep_unpruned(from_run: str, storage: Storage) -> None:
    """Copies the checkpoint of the never-pruned network, which the final comparison uses, from the run that this one
    begins with.
    """
    if not has_checkpoint(storage, UNPRUNED):
        save_checkpoint(storage, UNPRUNED, model=load_checkpoint(Storage.open(from_run), UNPRUNED).model)


def calibration_of(
    prepared: Prepared, journal: Journal, excluded: tuple[str, ...], on_unreadable: Callable[[str], None]
) -> Drawn:
    """Draws the calibration set. A resumed run draws it again, with the same seed and the same images left out.

    Raises DataError if the digest of the images differs from the first drawing's.
    """
    config = prepared.config
    last = journal.last(CalibrationDrawn.NAME)
    known = None if last is None else read_event(last, journal.uri)
    assert known is None or isinstance(known, CalibrationDrawn)
    left_out = list(excluded)

    def leave_out(name: str) -> None:
        left_out.append(name)
        on_unreadable(name)

    train, count = prepared.train, config.search.images
    calibration: Drawn
    if isinstance(train, Examples):
        calibration = draw_calibration_examples(train, images=count, seed=config.seed)
    else:
        calibration = draw_calibration_images(
            train,
            config.data,
            images=count,
            seed=config.seed,
            excluded=excluded if known is None else known.excluded,
            on_unreadable=leave_out,
        )
    if prepared.task.runs_model:
        logger.info("every candidate is measured on a pruned copy of the network, because the loss runs it itself")
    if known is None:
        drawn = CalibrationDrawn(images=len(calibration.indices), digest=calibration.digest, excluded=tuple(left_out))
        journal.append(drawn.NAME, data_of(drawn))
        logger.info("losses are measured on %d training images", len(calibration.indices))
    elif known.digest != calibration.digest:
        raise DataError(
            f"the calibration set drawn now has digest {calibration.digest[:12]}, the run's "
            f"{known.digest[:12]}: the training images or the decoder have changed; restore them, or start a "
            "new run with another --name"
        )
    return calibration
