"""Journals of runs by hand, for tests of their pages."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from run_events import decision, epoch_done, iteration_done, metrics, phase_done, run_finished, run_started

from laasp_ray.cost.latency import Latency
from laasp_ray.export.latency import EngineLatency
from laasp_ray.recipes import recipe
from laasp_ray.records import Candidate, CandidateLoss, MeasuredLoss, Ranking
from laasp_ray.run.events import FaultSurvived, LatencyMeasured, RunEvent, data_of
from laasp_ray.store.journal import Journal, write_candidates
from laasp_ray.store.storage import Storage

MACHINE = {"driver": "a processor, 2 CPUs, no GPU", "workers": "Ray, 2 CPUs, 2 trainers", "software": "torch 9"}
LATENCY = (Latency(4.0, (3.5, 5.0), 1, "cpu", 2, 20), Latency(3.0, (2.5, 4.0), 1, "cpu", 2, 20))


def started(**changes: Any) -> Any:
    """Two convolutions, b behind a, and a classifier: 400 + 800 + 100 multiply-accumulates."""
    config = recipe("resnet50_digits").to_dict()
    config["prune"] |= changes.pop("prune", {})
    values = {
        "config": config | changes.pop("config", {}),
        "macs": 1300,
        "parameters": 250,
        "filters": {"a": 4, "b": 8},
        "macs_by_layer": {"a": 400, "b": 800, "fc": 100},
        "weight_shapes": {"a": (4, 3, 3, 3), "b": (8, 4, 1, 1), "fc": (10, 8)},
        "machine": MACHINE,
        "train_images": 1442,
        "test_images": 355,
    }
    return run_started(**(values | changes))


def pruned(number: int, layer: str, kept: dict[str, int], tensors: dict[str, Any], gone: float, **changes: Any) -> Any:
    """An iteration that removes a filter of `layer`."""
    step = {"version": 1, "tensors": tensors, "attributes": {}, "layers": {}}
    chosen = decision(iteration=number, layer=layer, criterion="l1", loss=1.25, loss_before=1.0, flops_reduction=gone)
    seconds = {"evaluate": 3.0, "apply": 1.0, "total": 5.0}
    values = {"step": step, "kept_filters": kept, "candidates": 2, "seconds": seconds}
    return iteration_done(replace(chosen, **changes.pop("decision", {})), **(values | changes))


def small_run() -> list[RunEvent]:
    """A finished run. The first prune leaves a 3 filters, and b as many inputs; the second leaves b 6 filters, and fc
    as many inputs: 300 + 450 + 75 = 825 of 1300 multiply-accumulates.
    """
    first = {"a.weight": {"0": [[0, 1, 3]]}, "b.weight": {"1": [[0, 1, 3]]}}
    second = {"b.weight": {"0": [[0, 1, 2, 3, 4, 5]]}, "fc.weight": {"1": [[0, 1, 2, 3, 4, 5]]}}
    return [
        started(),
        epoch_done(loss=2.0, top1=0.4, seconds=60.0, test_seconds=2.0, metrics=metrics(0.5, 1.5, 355)),
        phase_done("train", metrics=metrics(0.5, 1.5, 355), seconds=62.0, evaluation_seconds=3.0),
        pruned(1, "a", {"a": 3}, first, 300 / 1300),
        FaultSurvived(text="a worker on 10.0.0.7 was lost"),
        pruned(2, "b", {"a": 3, "b": 6}, second, 475 / 1300, decision={"criterion": "cosine", "filters": (6, 7)}),
        epoch_done(phase="final", training_phase=1, loss=1.0, top1=0.7, seconds=60.0, epoch=8, epochs_trained=2),
        phase_done("final", training_phase=1, metrics=metrics(0.75, 0.8, 355), seconds=61.0, evaluation_seconds=3.0),
        LatencyMeasured(rows=(EngineLatency(engine="eager", batch_size=1, unpruned=LATENCY[0], pruned=LATENCY[1]),)),
        run_finished(
            macs=825,
            macs_unpruned=1300,
            flops_reduction=475 / 1300,
            parameters=150,
            parameters_unpruned=250,
            metrics=metrics(0.75, 0.8, 355),
            seconds=138.0,
        ),
    ]


def candidates(*found: tuple[str, str, float]) -> Ranking:
    return Ranking(
        [
            CandidateLoss(
                candidate=Candidate(layer=layer, criterion=criterion, filters=(0,), flops_reduction=0.1),
                measured=MeasuredLoss(loss, 100),
            )
            for layer, criterion, loss in found
        ]
    )


def store(storage: Storage, events: list[RunEvent], *, with_candidates: bool = True) -> Storage:
    """Writes the journal, and the candidates of iterations 1 and 2 if they are among the events."""
    journal = Journal(storage)
    for event in events:
        journal.append(event.NAME, data_of(event))
        if with_candidates and event.NAME == "iteration" and event.iteration <= 2:
            write_candidates(
                storage, event.iteration, candidates(("a", "l1", 1.25), ("a", "l2", 1.5), ("b", "l1", 2.0))
            )
    return storage


def big_run(iterations: int, layers: int, criteria: int) -> tuple[list[RunEvent], dict[int, Ranking]]:
    """A run of many iterations, each with `layers` x `criteria` candidates."""
    draw = random.Random(0)
    names = [f"layer{number // 10}.{number % 10}.conv_with_a_long_name" for number in range(layers)]
    events: list[RunEvent] = [
        started(
            filters=dict.fromkeys(names, 512),
            macs_by_layer=dict.fromkeys(names, 10**9),
            weight_shapes=dict.fromkeys(names, (512, 512, 3, 3)),
            macs=layers * 10**9,
        )
    ]
    rankings = {}
    for number in range(1, iterations + 1):
        rankings[number] = candidates(
            *((name, f"criterion{each}", draw.random()) for name in names for each in range(criteria))
        )
        best = rankings[number][0]
        events.append(
            pruned(
                number,
                best.layer,
                {best.layer: 100},
                {},
                number / (2 * iterations),
                decision={"criterion": best.criterion},
                candidates=len(rankings[number]),
            )
        )
        events.append(epoch_done(phase="fine-tune", loss=1 / number, metrics=metrics(0.9, 0.3)))
    return events, rankings
