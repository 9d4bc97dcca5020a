"""The loop, in the driver: what the state asks for is done, written down, and gives the next state.

Everything it needs is handed to it: who trains, who measures, where it is stored, who shows it. An iteration, an epoch
and a training phase are each one event of the journal, written last; a run that is cut off goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laasp_ray.config import TARGETS, RunConfig
from laasp_ray.errors import DataError, ExhaustedError, TrainingError
from laasp_ray.methods import IterationContext, PruningMethod
from laasp_ray.methods.targets import measure_targets
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan, macs_after
from laasp_ray.records import Metrics, Place, RunState, to_json
from laasp_ray.report.progress import Progress
from laasp_ray.report.tensorboard import ScalarWriter
from laasp_ray.run.state import advance, next_training_phase
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.executor import Executor
from laasp_ray.store.artifact import save_pruned
from laasp_ray.store.checkpoint import delete_checkpoints, load_checkpoint, save_checkpoint
from laasp_ray.store.journal import Event, Journal, write_candidates
from laasp_ray.store.storage import Storage
from laasp_ray.train.loop import EpochDone, PhaseResult, TrainingPhase
from laasp_ray.train.trainer import Trainer

UNPRUNED = "unpruned"
"""The checkpoint of the network just before its first prune, or trained without any; kept, to compare others with."""

_SYNC_S = 300
"""How often, in seconds, a long training phase's scalars are copied into the run's folder: each time adds files."""


@dataclass(frozen=True)
class RunServices:
    """What the controller is handed. `trainer` and `executor` are made when first asked for, and then live on.

    The executor needs the calibration set drawn: it is told which images to leave out, and tells which it could not
    read. `method` says what to prune next. `locate` says where the images of these names are in the data set.
    """

    trainer: Callable[[], Trainer]
    executor: Callable[[tuple[str, ...], Callable[[str], None]], Executor]
    method: PruningMethod
    storage: Storage
    journal: Journal
    progress: Progress
    events: ScalarWriter
    locate: Callable[[Sequence[str]], Mapping[str, Place]]


class Controller:
    """One run. `unpruned` has the initial weights; `state` is the fold of the journal so far."""

    def __init__(
        self,
        config: RunConfig,
        unpruned: nn.Module,
        example_input: torch.Tensor,
        baseline: Baseline,
        state: RunState,
        parts: RunServices,
    ) -> None:
        self._config, self._unpruned, self._example, self._baseline = config, unpruned, example_input, baseline
        self._parts = parts
        self._loader_noted = self._has_teacher = False
        self.state = state
        self._network, self._optimizer_state = self._restore()

    def run(self) -> nn.Module:
        """Goes on until the run is done and returns the pruned network, on the CPU, in eval mode."""
        last: PhaseResult | None = None
        given = self.state.phase == "prune" or (not self._config.prunes and self._config.train.pretrained is not None)
        if given and self.state.iteration == 0 and not self._has("baseline") and not self._has("training_phase"):
            last = self._measure_given_weights()
        while self.state.phase != "done":
            if self.state.phase == "prune":
                self._iteration()
            else:
                last = self._train()
        return self._finish(last)

    def _has(self, name: str) -> bool:
        return self._parts.journal.last(name) is not None

    def _restore(self) -> tuple[NetworkState, Mapping[str, torch.Tensor]]:
        """The network as the state has it, and what is carried from epoch to epoch in the middle of a training
        phase."""
        state = self.state
        checkpoint = load_checkpoint(self._parts.storage, state.checkpoint)
        network = NetworkState(_plan(state.checkpoint_plan), checkpoint.model)
        optimizer_state = checkpoint.optimizer_state if state.phase_epochs_done else {}
        for step in state.steps:
            network = self._after(network, Plan.from_json(step))
        return network, optimizer_state

    def _after(self, network: NetworkState, step: Plan) -> NetworkState:
        model = rebuild(self._unpruned, network)
        apply_plan(model, step)
        return capture(model, network.plan.then(step))

    def _record(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes the event, then moves on; a run killed between the two finds the event when it is resumed."""
        self._parts.journal.append(name, data)
        self.state = advance(self.state, name, data, self._config)

    def _measure_given_weights(self) -> PhaseResult:
        """What the network can do before the first prune, where training up to there is left out."""
        self._parts.progress.phase("evaluate", "the weights given")
        state = self.state
        training_phase = TrainingPhase(
            number=state.phases_done, phase="baseline", excluded=state.excluded, places=state.places
        )
        done = self._parts.trainer().run(self._network, {}, training_phase, self._epoch_done)
        self._note_unreadable(done.unreadable)
        self._note_loader(done.loader)
        self._record("baseline", {"metrics": to_json(done.metrics), "loader": done.loader, "seconds": done.seconds})
        self._show_metrics("baseline", done)
        return done

    def _iteration(self) -> None:
        started = time.perf_counter()
        parts, number = self._parts, self.state.iteration + 1
        parts.progress.phase("prune", f"iteration {number}")
        if number == 1:
            save_checkpoint(parts.storage, UNPRUNED, model=self._network.tensors)
        model = rebuild(self._unpruned, self._network).eval()
        executor = parts.executor(self.state.excluded, lambda name: self._note_unreadable((name,)))
        prepared = time.perf_counter() - started
        now = IterationContext(
            model=model,
            network=self._network,
            example_input=self._example,
            baseline=self._baseline,
            config=self._config.prune,
            executor=executor,
            iteration=number,
            on_candidate=lambda done, total, entry: parts.progress.candidates(done, total, entry, number),
        )
        try:
            iteration = parts.method(now)
        except ExhaustedError as error:
            if not self._config.prune.latency_reduction:
                raise
            self._end_short(error)
            return
        applied = time.perf_counter()
        self._network, self._optimizer_state = self._after(self._network, iteration.step), {}
        if iteration.ranking:
            write_candidates(parts.storage, number, iteration.ranking)
        measured = measure_targets(self._unpruned, self._network, self._config)
        ended = time.perf_counter()
        seconds = {"prepare": prepared, **iteration.seconds, "apply": ended - applied, "total": ended - started}
        self._record(
            "iteration",
            {
                "decision": to_json(iteration.decision),
                "step": iteration.step.to_json(),
                "kept_filters": {layer: len(kept) for layer, kept in self._network.plan.layers.items()},
                "candidates": len(iteration.ranking),
                "seconds": seconds,
                **measured.journaled(),
            },
        )
        reached, targets = self.state.reached, self._config.prune.targets
        parts.progress.decision(iteration.decision, reached, targets, ended - started)
        parts.events.scalar("prune/loss", iteration.decision.loss, number)
        for of in {"FLOPs": 0.0} | targets:
            parts.events.scalar(f"prune/{TARGETS[of]}", reached[of], number)

    def _end_short(self, error: ExhaustedError) -> None:
        """No filter is left to give, and latency, which nobody could tell before, is not what it should be."""
        self._record("exhausted", {"reason": str(error)})
        reached, targets = self.state.reached, self._config.prune.targets
        short = ", ".join(f"{of} {-reached[of]:+.2%} of {share:.2%}" for of, share in targets.items())
        self._parts.progress.note(f"pruning ends short of its targets ({short}): {error}")

    def _train(self) -> PhaseResult:
        started = time.perf_counter()
        training_phase, parts = self._training_phase(), self._parts
        parts.progress.phase(training_phase.phase, f"{len(training_phase.epochs) - training_phase.done} epochs")
        try:
            done = self._trainer().run(self._network, self._optimizer_state, training_phase, self._epoch_done)
        except TrainingError as error:
            good = f"checkpoints/{self.state.checkpoint}.safetensors"
            raise TrainingError(f"{error}; last good checkpoint: {parts.storage.uri}/{good}") from error
        self._note_unreadable(done.unreadable)
        self._note_loader(done.loader)
        self._optimizer_state = {}
        self._record(
            "training_phase",
            {
                "phase": training_phase.phase,
                "training_phase": training_phase.number,
                "metrics": to_json(done.metrics),
                "loader": done.loader,
                "seconds": time.perf_counter() - started,
                "evaluation_seconds": done.seconds,
            },
        )
        self._show_metrics(training_phase.phase, done)
        parts.events.sync()
        return done

    def _trainer(self) -> Trainer:
        """It distils, if the run does, once there is a network from before the first prune to distil from."""
        trainer = self._parts.trainer()
        if self._config.train.distill and self.state.iteration and not self._has_teacher:
            trainer.set_teacher(NetworkState(Plan.empty(), load_checkpoint(self._parts.storage, UNPRUNED).model))
            self._has_teacher = True
        return trainer

    def _training_phase(self) -> TrainingPhase:
        return next_training_phase(self.state, self._config)

    def _epoch_done(self, done: EpochDone) -> None:
        state, plan, parts = self.state, done.plan, self._parts
        self._network = NetworkState(self._network.plan, done.tensors)
        self._optimizer_state = done.optimizer_state
        name = f"{state.epochs_trained:06d}"
        save_checkpoint(parts.storage, name, model=done.tensors, optimizer_state=done.optimizer_state)
        self._note_unreadable(done.unreadable)
        self._record(
            "epoch",
            {
                "phase": state.phase,
                "training_phase": state.phases_done,
                "epoch": plan.epoch,
                "epochs_trained": state.epochs_trained + 1,
                "learning_rate": plan.learning_rate,
                "loss": done.loss,
                "top1": done.top1,
                "images": done.images,
                "metrics": None if done.metrics is None else to_json(done.metrics),
                "seconds": done.seconds,
                "test_seconds": done.test_seconds,
                "checkpoint": name,
            },
        )
        delete_checkpoints(parts.storage, keep=[name, UNPRUNED])
        epochs = len(next_training_phase(state, self._config).epochs)
        metrics = {"loss": done.loss, "top1": done.top1}
        shown = metrics if done.metrics is None else metrics | {"test top1": done.metrics.top1}
        parts.progress.epoch(state.phase, done.position + 1, epochs, shown, plan.learning_rate)
        for key, value in metrics.items():
            parts.events.scalar(f"train/{key}", value, state.epochs_trained + 1)
        parts.events.scalar("learning_rate", plan.learning_rate, state.epochs_trained + 1)
        if done.metrics is not None:
            self._plot_metrics(done.metrics)
        parts.events.sync(at_most_every=_SYNC_S)

    def _note_unreadable(self, names: tuple[str, ...]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.state.excluded]
        if new:
            places = self._parts.locate(new)
            for name in new:
                where = to_json(places[name]) if name in places else {}
                where.pop("name", None)
                self._record("excluded", {"image": name, "reason": "cannot be read or decoded", **where})
                self._parts.progress.note(f"left out from now on, cannot be read or decoded: {name}")
        bound = self._config.data.max_unreadable
        if len(self.state.excluded) > bound:
            raise DataError(
                f"{len(self.state.excluded)} images cannot be read or decoded, the last {self.state.excluded[-1]}; at "
                f"most {bound} may be left out: go on without them with a higher data.max_unreadable, or repair them "
                "and start a run under another --name"
            )

    def _note_loader(self, loader: str) -> None:
        """Said once, of the trainers: their log does not reach the driver."""
        if not self._loader_noted:
            self._parts.progress.note(f"the trainers' images are decoded by {loader}")
        self._loader_noted = True

    def _show_metrics(self, phase: str, done: PhaseResult) -> None:
        metrics = done.metrics
        self._parts.progress.note(
            f"after {phase}: test top-1 {metrics.top1:.2%}, top-5 {metrics.top5:.2%}, loss {metrics.loss:.4f} "
            f"on {metrics.images} images"
        )
        self._plot_metrics(metrics)

    def _plot_metrics(self, metrics: Metrics) -> None:
        for key in ("loss", "top1", "top5"):
            self._parts.events.scalar(f"test/{key}", getattr(metrics, key), self.state.epochs_trained)

    def _finish(self, last: PhaseResult | None) -> nn.Module:
        parts = self._parts
        if not self._config.prunes:
            save_checkpoint(parts.storage, UNPRUNED, model=self._network.tensors)
        model = rebuild(self._unpruned, self._network).eval()
        # A run killed between its last training phase and here has that training phase's metrics in the journal only.
        metrics = to_json(last.metrics) if last is not None else parts.journal.last("training_phase").data["metrics"]  # type: ignore[union-attr]
        macs = macs_after(self._baseline.macs, self._network.plan)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        summary = {
            "macs": macs,
            "macs_unpruned": self._baseline.macs.total,
            "macs_convention": self._baseline.macs.convention,
            "flops_reduction": 1 - macs / self._baseline.macs.total,
            "parameters": parameters,
            "parameters_unpruned": sum(parameter.numel() for parameter in self._unpruned.parameters()),
            "metrics": metrics,
            "best": _best(parts.journal.events()),
        }
        others = [of for of in self._config.prune.targets if of != "FLOPs"]
        summary |= {TARGETS[of]: self.state.reached[of] for of in others}
        summary = dict(self._save(model, summary))
        parts.events.sync()
        self._record("finish", {**summary, "seconds": _seconds(parts.journal.events())})
        parts.progress.finished(f"{self._result(summary)}; in {parts.storage.uri}/pruned")
        return model

    def _save(self, model: nn.Module, summary: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes the finished network; gives what there is to say of it, for the journal."""
        save_pruned(
            self._parts.storage.child("pruned"),
            model=model,
            model_config=self._config.model,
            plan=self._network.plan,
            metrics=summary,
        )
        return summary

    def _result(self, summary: Mapping[str, Any]) -> str:
        if not self._config.prunes:
            return "trained, nothing pruned"
        targets = {"FLOPs": 0.0} | self._config.prune.targets
        return "pruned by " + ", ".join(f"{summary[TARGETS[of]]:.2%} of {of}" for of in targets)


def _best(events: Iterable[Event]) -> dict[str, Any] | None:
    """The epoch of the final training with the highest test top-1, the first of equals; None if that had no epochs.

    `epoch` is the schedule's, from 0. Only epochs count that were tested; the last one was, at the end of its training
    phase.
    """
    tested: list[dict[str, Any]] = []
    epoch: int | None = None
    for event in events:
        data = event.data
        if event.name in ("epoch", "training_phase") and data["phase"] == "final":
            epoch = data.get("epoch", epoch)
            if epoch is not None and data["metrics"] is not None:
                tested.append({"epoch": epoch, "metrics": data["metrics"]})
    return max(tested, key=lambda found: found["metrics"]["top1"], default=None)


def _seconds(events: Iterable[Event]) -> float:
    """What the run's epochs, iterations and evaluations took, whichever attempt they were made in."""
    parts = {
        "epoch": lambda data: data["seconds"] + data["test_seconds"],
        "iteration": lambda data: data["seconds"]["total"],
        "training_phase": lambda data: data["evaluation_seconds"],
        "baseline": lambda data: data["seconds"],
        "stage": lambda data: data["seconds"],
    }
    return sum(float(parts[event.name](event.data)) for event in events if event.name in parts)


def _plan(data: Mapping[str, Any] | None) -> Plan:
    return Plan.empty() if data is None else Plan.from_json(data)
