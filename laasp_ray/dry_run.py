"""What a run will do and how long it will take, without running it: counted, and scaled up from a short measurement."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from laasp_ray.config import PruneConfig, RunConfig
from laasp_ray.preflight import Prepared, check_workers, prepare
from laasp_ray.progression import initial_state
from laasp_ray.pruning.groups import PruningGraph
from laasp_ray.pruning.plan import parameters_after
from laasp_ray.report.pace import format_duration
from laasp_ray.search.candidates import propose, tasks_of
from laasp_ray.search.engine import Sites
from laasp_ray.train.speed import TrainingSpeed, measure_forward, measure_training


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run consists of, as far as it can be told before.

    `proposals` and `candidates` (distinct) are the first turn's, `removes` the mean share of FLOPs that one of them
    takes. `passes` is what measuring them all costs, in forward passes of the unpruned network over the `loss_images`.
    `epochs` are by phase. `preparing_s` is what the graph and the proposals of one turn took.
    """

    proposals: int
    candidates: int
    removes: float
    passes: float
    loss_images: int
    turns: int
    recoveries: int
    epochs: Mapping[str, int]
    evaluations: int
    preparing_s: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run has to work with: `workers` trainers, `tasks` evaluation tasks at a time, and one of each's speed."""

    workers: int
    tasks: int
    trainer: TrainingSpeed
    forward: float


def dry_run(config: RunConfig, *, distributed: bool = True, ray_address: str | None = None, repeats: int = 1) -> str:
    """The plan of `repeats` runs as text. Checks all that a run checks first, and raises as it does; stores nothing."""
    prepared = prepare(config)
    machine = _on_ray(prepared, ray_address) if distributed else _here(prepared)
    return describe(prepared, workload_of(prepared), machine, repeats)


def workload_of(prepared: Prepared) -> Workload:
    config, prune = prepared.config, prepared.config.prune
    started = time.perf_counter()
    graph = PruningGraph(
        prepared.unpruned, prepared.example_input, ignored=prune.ignored, extra_layers=prune.extra_layers
    )
    proposals = propose(prepared.unpruned, graph, prepared.baseline.macs, prepared.baseline, prune)
    preparing = time.perf_counter() - started
    sites = Sites(copy.deepcopy(prepared.unpruned).eval(), prepared.example_input)
    *costs, whole = (sites.cost(task).own for task in tasks_of(proposals))
    removes = sum(proposal.candidate.flops_reduction for proposal in proposals) / len(proposals)
    left = sum(parameters_after(graph.shapes, proposal.step) for proposal in proposals) / len(proposals)
    each = {"FLOPs": removes, "parameters": 1 - left / prepared.baseline.parameters, "latency": removes}
    prunes = max(share / each[of] for of, share in prune.targets.items())
    turns = max(1, math.ceil(prunes / prune.prunes_per_turn - 1e-9))
    between = max(1, math.ceil(prune.recover_every / (removes * prune.prunes_per_turn) - 1e-9))
    recoveries = turns // between if prune.recover_epochs else 0
    train = config.train
    pruned_first = initial_state(config).phase == "prune"
    return Workload(
        proposals=sum(1 + len(proposal.candidate.also) for proposal in proposals),
        candidates=len(proposals),
        removes=removes,
        # Besides the candidates: the network as it stands, its statistics, what several prunes come to together.
        passes=1 + config.search.reestimate_batchnorm + 2 * (prune.prunes_per_turn > 1) + sum(costs) / whole,
        loss_images=min(config.search.images, len(prepared.train)),
        turns=turns,
        recoveries=recoveries,
        epochs={
            "train": 0 if pruned_first else train.prune_epoch,
            "recover": recoveries * prune.recover_epochs,
            "final": train.epochs - train.prune_epoch,
        },
        evaluations=recoveries + 2,  # after each recovery, before the first prune and at the end
        preparing_s=preparing,
    )


def seconds_of(workload: Workload, machine: Machine, *, train_images: int, test_images: int) -> dict[str, float]:
    """Seconds by what they go to, at the unpruned network's speed throughout."""
    epoch = train_images / (machine.trainer.training * machine.workers)
    turn = workload.passes * workload.loss_images / (machine.forward * machine.tasks) + workload.preparing_s
    evaluation = test_images / (machine.trainer.evaluation * machine.workers)
    seconds = {phase: epochs * epoch for phase, epochs in workload.epochs.items()}
    return {
        "train": seconds["train"],
        "turns": workload.turns * turn,
        "recover": seconds["recover"],
        "final": seconds["final"],
        "evaluate": workload.evaluations * evaluation,
    }


def describe(prepared: Prepared, workload: Workload, machine: Machine, repeats: int = 1) -> str:
    """The plan as lines of text, its assumptions last."""
    config, prune, train = prepared.config, prepared.config.prune, prepared.config.train
    test_images, train_images = len(prepared.test), len(prepared.train)
    seconds = seconds_of(workload, machine, train_images=train_images, test_images=test_images)
    total = sum(seconds.values())
    if workload.epochs["train"]:
        start = f"from scratch, {workload.epochs['train']} epochs"
    elif train.pretrained:
        start = f"the weights of {train.pretrained}"
    else:
        start = "new weights, untrained"
    evaluated = workload.candidates * workload.loss_images
    rows = [
        ("network", f"{config.model.builder}, {prepared.baseline.macs.total:,} multiply-accumulates"),
        ("images", f"{train_images:,} to train on, {test_images:,} to test on"),
        ("start", f"{start}; pruning at epoch {train.prune_epoch} of {train.epochs}"),
        ("turns", _turns(prune, workload)),
        (
            "candidates",
            f"{workload.proposals} proposals a turn, {workload.candidates} distinct "
            f"({len(prepared.baseline.filters)} layers, {len(prune.criteria)} criteria)",
        ),
        (
            "evaluated",
            f"{workload.loss_images:,} images for each candidate: {evaluated:,} a turn, worth "
            f"{workload.passes:.0f} forward passes over them",
        ),
        ("recoveries", f"about {workload.recoveries}, epochs each: {prune.recover_epochs}"),
        ("final", f"{workload.epochs['final']} epochs"),
        ("workers", f"{machine.workers}, each {machine.trainer.device}, images decoded by {machine.trainer.loader}"),
        (
            "measured",
            f"{machine.trainer.training:,.1f} images/s in training and {machine.trainer.evaluation:,.1f} in evaluation "
            f"of one worker, {machine.forward:,.1f} in the forward pass of one of {machine.tasks} evaluation tasks",
        ),
        *((f"time, {part}", format_duration(spent)) for part, spent in seconds.items()),
        ("time, all", f"at most about {format_duration(total)}"),
    ]
    if repeats > 1:
        rows.append((f"{repeats} runs", format_duration(repeats * total)))
    width = max(len(label) for label, _ in rows)
    lines = [f"Dry run of {config.name}: nothing is trained and nothing stored.", ""]
    lines += [f"{label.ljust(width)}  {text}" for label, text in rows]
    return "\n".join([*lines, "", *_assumptions(config)])


def _turns(prune: PruneConfig, workload: Workload) -> str:
    targets = " and ".join(f"{share:.2%} of {of}" for of, share in prune.targets.items())
    together = f", {prune.prunes_per_turn} together" if prune.prunes_per_turn > 1 else ""
    of_flops = "" if list(prune.targets) == ["FLOPs"] else " of FLOPs"
    return f"about {workload.turns}: {targets}, {workload.removes:.2%}{of_flops} a candidate{together}"


def _assumptions(config: RunConfig) -> list[str]:
    lines = [
        "It is taken that",
        "- the network stays as slow as it is unpruned: later turns and epochs are faster",
        "- later turns have as many candidates as the first, and the chosen ones take what all do on average",
        "- work goes by images over all workers, and by multiply-accumulates over candidates; what workers tell one "
        "another, starting them, and storing are left out",
    ]
    if config.train.distill:
        lines.append("- every epoch asks the teacher: those before the first prune do not, and are faster")
    if config.prune.prunes_per_turn > 1:
        lines.append(f"- every turn makes {config.prune.prunes_per_turn} prunes")
    if "latency" in config.prune.targets:
        lines.append("- latency falls as FLOPs do")
    if config.search.racing == "on":
        lines.append("- every candidate sees all images: racing drops most of them long before, so turns are shorter")
    return lines


def _here(prepared: Prepared) -> Machine:
    config = prepared.config
    check_workers(config, len(prepared.train), 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(
        workers=1,
        tasks=1,
        trainer=measure_training(prepared.unpruned, config, device),
        forward=measure_forward(prepared.unpruned, config, device),
    )


def _on_ray(prepared: Prepared, address: str | None) -> Machine:
    from laasp_ray.distributed import cluster, probe  # Ray takes seconds to import
    from laasp_ray.distributed.executor import slots_of
    from laasp_ray.distributed.trainer import put_network

    config = prepared.config
    with cluster.connected(address) as resources:
        share = cluster.share_of(resources, config.cluster)
        check_workers(config, len(prepared.train), share.workers)
        trainer, forward = probe.measure(put_network(prepared.unpruned), config, share)
        return Machine(workers=share.workers, tasks=slots_of(resources, share), trainer=trainer, forward=forward)
