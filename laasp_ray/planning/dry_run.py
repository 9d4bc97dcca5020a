"""What a run will do and how long it will take, without running it: counted, and scaled up from a short measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laasp_ray.config import PruneConfig, RunConfig
from laasp_ray.criteria import looks_at_data
from laasp_ray.distributed.address import check_address
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.planning.workload import (
    Iterations,
    LaaspIterations,
    PlsIterations,
    SparseStages,
    Workload,
    network_of,
    workload_of,
)
from laasp_ray.report.durations import format_duration
from laasp_ray.report.repeats import runs_of
from laasp_ray.report.tables import table_lines
from laasp_ray.run.preflight import Prepared, check_workers, folded, open_run, prepare
from laasp_ray.store.addresses import public
from laasp_ray.store.journal import Journal
from laasp_ray.train.speed import TrainingSpeed, measure_forward, measure_training

Rows = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run has to work with: `workers` trainers, `tasks` evaluation tasks at a time, and one of each's speed."""

    workers: int
    tasks: int
    trainer: TrainingSpeed
    forward: float


@random_state_kept()
def dry_run(
    config: RunConfig, *, distributed: bool = True, ray_address: str | None = None, repeats: int | None = None
) -> str:
    """The plan of a run, or of `repeats` runs (report/repeats.py), as text; stores nothing.

    Checks all that a run checks first, and raises as it does. Of a run that has begun it is the whole run's plan still,
    and what a beginning needs must be there.
    """
    runs = [config] if repeats is None else runs_of(config, repeats)
    stored = [line for run in runs if (line := _stored(run))]
    if distributed:
        check_address(ray_address)
    prepared = prepare(config)
    machine = _on_ray(prepared, ray_address) if distributed else _here(prepared)
    return describe(prepared, workload_of(prepared), machine, runs=len(runs), stored=stored)


def seconds_of(workload: Workload, machine: Machine, *, train_images: int, test_images: int) -> dict[str, float]:
    """Seconds by what they go to, at the speed of the network that was measured throughout."""
    epoch = train_images / (machine.trainer.training * machine.workers)
    evaluation = test_images / (machine.trainer.evaluation * machine.workers)
    epochs = {phase: count * epoch for phase, count in workload.epochs.items()}
    seconds = {"train": epochs["train"]}
    if isinstance(workload, Iterations):
        iteration = (
            workload.passes * workload.calibration_images / (machine.forward * machine.tasks) + workload.preparing_s
        )
        seconds["iterations"] = workload.iterations * iteration
    return {
        **seconds,
        "fine-tune": epochs["fine-tune"],
        "final": epochs["final"],
        "evaluate": workload.evaluations * evaluation,
    }


def describe(
    prepared: Prepared, workload: Workload, machine: Machine, *, runs: int = 1, stored: Sequence[str] = ()
) -> str:
    """The plan as lines of text, its assumptions last. `stored`: what there is of the runs already, a line each."""
    config = prepared.config
    test_images, train_images = len(prepared.test), len(prepared.train)
    seconds = seconds_of(workload, machine, train_images=train_images, test_images=test_images)
    total = sum(seconds.values())
    measured = (
        f"{machine.trainer.training:,.1f} images/s in training and {machine.trainer.evaluation:,.1f} in evaluation "
        "of one worker"
    )
    if isinstance(workload, Iterations):
        measured += f", {machine.forward:,.1f} in the forward pass of one of {machine.tasks} evaluation tasks"
    rows = [
        *(("in the store", line) for line in stored),
        ("network", f"{config.model.builder}, {prepared.baseline.macs.total:,} multiply-accumulates"),
        ("images", f"{train_images:,} to train on, {test_images:,} to test on"),
        ("start", _start(config, workload)),
        *_what_is_pruned(prepared, workload),
        ("final", f"{workload.epochs['final']} epochs"),
        ("evaluations", f"about {workload.evaluations} on the test images"),
        ("workers", f"{machine.workers}, each {machine.trainer.device}, images decoded by {machine.trainer.loader}"),
        ("measured", measured),
        *((f"time, {part}", format_duration(spent)) for part, spent in seconds.items()),
        ("time, all", f"at most about {format_duration(total)}"),
    ]
    if runs > 1:
        rows.append((f"{runs} runs", format_duration(runs * total)))
    lines = [f"Dry run of {config.name}: nothing is trained and nothing stored.", ""]
    lines += table_lines(rows, rule=False, left=(0, 1))
    return "\n".join([*lines, "", "It is taken that", *(f"- {line}" for line in _assumptions(config, workload))])


def _stored(run: RunConfig) -> str:
    storage = open_run(run)
    journal = Journal(storage)
    if journal.last("finish") is not None:
        return f"{run.name} is finished, and would be left as it is"
    if not journal.events():
        return ""
    state = folded(journal, run)
    done = f"iterations done: {state.iteration}, epochs: {state.epochs_trained}"
    return f"{run.name} has begun ({done}), and would go on; what follows counts all of it"


def _start(config: RunConfig, workload: Workload) -> str:
    train = config.train
    if not config.prunes:
        return (
            f"the weights of {train.pretrained}, at epoch {train.prune_epoch}" if train.pretrained else "from scratch"
        )
    if workload.epochs["train"]:
        start = f"from scratch, {workload.epochs['train']} epochs"
    elif config.sparsity is not None and config.sparsity.from_run is not None:
        start = f"the pruned network of {public(config.sparsity.from_run)}"
    else:
        start = f"the weights of {train.pretrained}" if train.pretrained else "new weights, untrained"
    return f"{start}; pruning at epoch {train.prune_epoch} of {train.epochs}"


def _what_is_pruned(prepared: Prepared, workload: Workload) -> Rows:
    prune = prepared.config.prune
    if isinstance(workload, SparseStages):
        return _stages(prepared.config, workload)
    if not isinstance(workload, Iterations):
        return [("pruned", "nothing, without a target")]
    iterations = f"about {workload.iterations}: " + " and ".join(
        f"{share:.2%} of {of}" for of, share in prune.targets.items()
    )
    of_flops = "" if list(prune.targets) == ["FLOPs"] else " of FLOPs"
    rows: Rows = []
    if isinstance(workload, LaaspIterations):
        joint = f", {prune.prunes_per_iteration} together" if prune.prunes_per_iteration > 1 else ""
        iterations += f", {workload.removes:.2%}{of_flops} a candidate{joint}"
        evaluated = workload.candidates * workload.calibration_images
        rows = [
            (
                "candidates",
                f"{workload.proposals} proposals an iteration, {workload.candidates} distinct "
                f"({len(prepared.baseline.filters)} layers, {len(prune.criteria)} criteria)",
            ),
            (
                "evaluated",
                f"{workload.calibration_images:,} images for each candidate: {evaluated:,} an iteration, worth "
                f"{workload.passes:.0f} forward passes over them",
            ),
        ]
    elif isinstance(workload, PlsIterations):
        iterations += f", {workload.removes:.2%}{of_flops} an iteration"
        rows = [
            (
                "filters",
                f"{workload.filters:,} in {workload.layers} layers that no others are coupled to; {workload.first:,} "
                f"go in the first iteration, {prune.percent:g}% of those left in each",
            ),
            (
                "evaluated",
                f"{workload.calibration_images:,} images: scored, then the loss without the filters that go and with "
                f"them, worth {workload.passes:.0f} forward passes over them",
            ),
        ]
    iterations += f"; at most {prune.iterations}" if prune.iterations else ""
    fine_tunes = f"about {workload.fine_tunes}, epochs each: {prune.fine_tune_epochs}"
    return [("iterations", iterations), *rows, ("fine-tunings", fine_tunes)]


def _stages(config: RunConfig, workload: SparseStages) -> Rows:
    assert config.sparsity is not None
    rows: Rows = []
    for number, stage in enumerate(workload.stages, 1):
        counts = sorted(stage.layers.items())
        layers = ", ".join(f"{pruned} of {config.sparsity.group} in {count} layers" for pruned, count in counts)
        rows.append(
            (
                f"stage {number}",
                f"{layers or 'nothing yet'}: {stage.kept:,} of {stage.weights:,} weights stay; "
                f"then {stage.epochs} epochs",
            )
        )
    reasons: dict[str, list[str]] = {}
    for layer, reason in workload.dense.items():
        reasons.setdefault(reason, []).append(layer)
    rows += [("left dense", f"{', '.join(layers)}: {reason}") for reason, layers in reasons.items()]
    return rows


def _assumptions(config: RunConfig, workload: Workload) -> list[str]:
    prune = config.prune
    left_out = "what workers tell one another, starting them, and storing are left out"
    if isinstance(workload, SparseStages):
        lines = [f"work goes by images over all workers; making and holding the masks, {left_out}"]
    elif not isinstance(workload, Iterations):
        lines = [f"work goes by images over all workers; {left_out}"]
    else:
        lines = ["the network stays as slow as it is unpruned: later iterations and epochs are faster"]
    if isinstance(workload, LaaspIterations):
        lines += [
            "later iterations have as many candidates as the first, and the chosen ones take what all do on average",
            "work goes by images over all workers, and by multiply-accumulates over candidates; " + left_out,
            *_assumptions_of_laasp(config, prune),
        ]
    if isinstance(workload, PlsIterations):
        lines += [
            "every layer loses the same share of its filters: which tell least is not known before they are scored",
            f"work goes by images over all workers; fitting the scores, {left_out}",
        ]
    if config.train.distill:
        lines.append("every epoch asks the teacher: those before the first prune do not, and are faster")
    if "latency" in prune.targets:
        lines.append("latency falls as FLOPs do")
    return lines


def _assumptions_of_laasp(config: RunConfig, prune: PruneConfig) -> list[str]:
    lines = []
    of_images = [name for name in prune.criteria if looks_at_data(name)]
    if of_images:
        lines.append(
            f"{', '.join(of_images)}: its picks, not known before images are looked at, are drawn here; where "
            "it agrees with others there are fewer distinct candidates"
        )
    if prune.prunes_per_iteration > 1:
        lines.append(f"every iteration makes {prune.prunes_per_iteration} prunes")
    if config.search.racing == "on":
        lines.append(
            "every candidate sees all images: racing drops most of them long before, so iterations are shorter"
        )
    return lines


def _here(prepared: Prepared) -> Machine:
    config, network = prepared.config, network_of(prepared)
    check_workers(config, len(prepared.train), 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(
        workers=1,
        tasks=1,
        trainer=measure_training(network, config, device),
        forward=measure_forward(network, config, device),
    )


def _on_ray(prepared: Prepared, address: str | None) -> Machine:
    from laasp_ray.distributed import cluster, probe  # Ray takes seconds to import
    from laasp_ray.distributed.executor import slots_of
    from laasp_ray.distributed.trainer import put_network

    config = prepared.config
    with cluster.connected(address) as resources:
        share = cluster.plan_resources(resources, config.cluster)
        check_workers(config, len(prepared.train), share.workers)
        trainer, forward = probe.measure(put_network(network_of(prepared)), config, share)
        return Machine(workers=share.workers, tasks=slots_of(resources, share), trainer=trainer, forward=forward)
