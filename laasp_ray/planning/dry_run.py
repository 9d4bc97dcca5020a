"""The steps of a run and their duration, without running it: the steps are counted, the seconds come from a short
measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laasp_ray.config import RunConfig
from laasp_ray.distributed.address import check_address
from laasp_ray.export.packages import missing
from laasp_ray.models.device import this_device
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.planning.workload import Workload, network_of, workload_of
from laasp_ray.report.durations import format_duration
from laasp_ray.report.repeats import runs_of
from laasp_ray.report.tables import table_lines
from laasp_ray.run.metrics import noun_of
from laasp_ray.run.preflight import Prepared, check_workers, folded, open_run, prepare
from laasp_ray.search.precision import computing_in
from laasp_ray.store.addresses import public
from laasp_ray.store.journal import Journal
from laasp_ray.train.speed import TrainingSpeed, measure_forward, measure_training


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The resources of a run: `workers` trainers, `tasks` evaluation tasks at the same time, and the speed of one of
    each.
    """

    workers: int
    tasks: int
    trainer: TrainingSpeed
    forward: float


@random_state_kept()
def dry_run(
    config: RunConfig, *, distributed: bool = True, ray_address: str | None = None, repeats: int | None = None
) -> str:
    """The plan of a run, or of `repeats` runs (report/repeats.py), as text. Stores nothing.

    Makes all checks that a run makes first, and raises the same errors. For a resumed run it plans the whole run, and
    everything that a new run needs must be present.
    """
    runs = [config] if repeats is None else runs_of(config, repeats)
    stored = [line for run in runs if (line := _stored(run))]
    if distributed:
        check_address(ray_address)
    prepared = prepare(config)
    machine = machine_for(prepared, distributed=distributed, ray_address=ray_address)
    return describe(prepared, workload_of(prepared), machine, runs=len(runs), stored=stored)


def machine_for(prepared: Prepared, *, distributed: bool, ray_address: str | None) -> Machine:
    """Measures the machine, or the cluster, that the run would have."""
    return _on_ray(prepared, ray_address) if distributed else _here(prepared)


def seconds_of(workload: Workload, machine: Machine, *, train_images: int, test_images: int) -> dict[str, float]:
    """Seconds by part of the run. The measured speed of the network is used for the whole run."""
    epoch = train_images / (machine.trainer.training * machine.workers)
    evaluation = test_images / (machine.trainer.evaluation * machine.workers)
    epochs = {phase: count * epoch for phase, count in workload.epochs.items()}
    seconds = {"train": epochs["train"]}
    pruning = workload.pruning
    if pruning is not None and pruning.passes:
        forward = pruning.passes * workload.calibration_images / (machine.forward * machine.tasks)
        seconds["iterations"] = pruning.iterations * (forward + pruning.preparing_s)
    return {
        **seconds,
        "fine-tune": epochs["fine-tune"],
        "final": epochs["final"],
        "evaluate": workload.evaluations * evaluation,
    }


def describe(
    prepared: Prepared, workload: Workload, machine: Machine, *, runs: int = 1, stored: Sequence[str] = ()
) -> str:
    """The plan as lines of text, with the assumptions last. `stored` has one line for each of the runs, on what is
    stored of it.
    """
    config = prepared.config
    test_images, train_images = len(prepared.test), len(prepared.train)
    noun = noun_of(prepared.task.data)
    seconds = seconds_of(workload, machine, train_images=train_images, test_images=test_images)
    total = sum(seconds.values())
    measured = (
        f"{machine.trainer.training:,.1f} {noun}/s in training and {machine.trainer.evaluation:,.1f} in evaluation "
        "of one worker"
    )
    if workload.calibration_images:
        measured += f", {machine.forward:,.1f} in the forward pass of one of {machine.tasks} evaluation tasks"
    rows = [
        *(("in the store", line) for line in stored),
        ("network", f"{config.model.builder}, {prepared.baseline.macs.total:,} multiply-accumulates"),
        (noun, f"{train_images:,} to train on, {test_images:,} to test on"),
        ("start", _start(config, workload)),
        *([("pruned", "nothing, without a target")] if workload.pruning is None else workload.pruning.rows),
        ("final", f"{workload.epochs['final']} epochs"),
        ("evaluations", f"about {workload.evaluations} on the test {noun}"),
        ("at the end", _at_the_end(config)),
        ("workers", f"{machine.workers}, each {machine.trainer.device}, {noun} read by {machine.trainer.loader}"),
        ("measured", measured),
        *((f"time, {part}", format_duration(spent)) for part, spent in seconds.items()),
        ("time, all", f"at most about {format_duration(total)}"),
    ]
    if runs > 1:
        rows.append((f"{runs} runs", format_duration(runs * total)))
    lines = [f"Dry run of {config.name}: nothing is trained and nothing stored.", ""]
    lines += table_lines(rows, rule=False, left=(0, 1))
    return "\n".join([*lines, "", "It is taken that", *(f"- {line}" for line in _assumptions(config, workload, noun))])


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
    elif config.prune.begins_with is not None:
        start = f"the pruned network of {public(config.prune.begins_with)}"
    else:
        start = f"the weights of {train.pretrained}" if train.pretrained else "new weights, untrained"
    return f"{start}; pruning at epoch {train.prune_epoch} of {train.epochs}"


def _at_the_end(config: RunConfig) -> str:
    settings, absent = config.export, missing()
    made = "onnx" if settings.format == "auto" else settings.format
    export = f"no export, since {', '.join(absent)} is missing" if made == "onnx" and absent else f"export: {made}"
    batches = ", ".join(map(str, settings.latency_batches))
    timed = f"timed in {', '.join(settings.latency)} at batch {batches}" if settings.latency else "not timed"
    return f"{export}; {timed}"


def _assumptions(config: RunConfig, workload: Workload, noun: str) -> list[str]:
    lines = [] if workload.pruning is None else list(workload.pruning.assumptions)
    lines.append(
        f"work goes by {noun} over all workers; what workers tell one another, starting them, storing, exporting and "
        "timing are left out"
    )
    if config.train.distill:
        lines.append("every epoch asks the teacher: those before the first prune do not, and are faster")
    return lines


def _here(prepared: Prepared) -> Machine:
    config, network = prepared.config, network_of(prepared)
    check_workers(config, len(prepared.train), 1)
    device = this_device()
    with computing_in(config.search.precision):
        forward = measure_forward(network, config, device)
    trainer = measure_training(network, config, device, task=prepared.task)
    return Machine(workers=1, tasks=1, trainer=trainer, forward=forward)


def _on_ray(prepared: Prepared, address: str | None) -> Machine:
    from laasp_ray.distributed import cluster, probe  # Ray takes seconds to import
    from laasp_ray.distributed.search_workers import slots_of
    from laasp_ray.distributed.trainer import put_network

    config = prepared.config
    with cluster.connected(address) as resources:
        share = cluster.plan_resources(resources, config.cluster)
        check_workers(config, len(prepared.train), share.workers)
        trainer, forward = probe.measure(put_network(network_of(prepared)), config, share, prepared.task)
        return Machine(workers=share.workers, tasks=slots_of(resources, share), trainer=trainer, forward=forward)
