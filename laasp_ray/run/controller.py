"""The main loop, in the driver. It carries out what the state asks for, records an event and computes the next state.

The caller passes in everything else: trainer, executor, store and observers. Each iteration, epoch and training phase
is one journal event, written last. A run that is interrupted resumes from the last event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from laasp_ray.config import TARGETS, RunConfig
from laasp_ray.errors import DataError, ExhaustedError, TrainingError
from laasp_ray.methods.base import FinishedNetwork, IterationContext, IterationResult, MethodReport, PruningMethod
from laasp_ray.methods.memory import IterationMemory
from laasp_ray.methods.targets import measure_targets
from laasp_ray.pruning.heads import kept_filters
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan, macs_after
from laasp_ray.pruning.sparsity.groups import masked
from laasp_ray.records import Metrics, Place, RunState, to_json
from laasp_ray.run.card import CARD, model_card
from laasp_ray.run.events import (
    BaselineMeasured,
    CandidatesMeasured,
    EpochDone,
    Exhausted,
    Happening,
    ImageExcluded,
    IterationDone,
    Observer,
    PhaseStarted,
    RunEvent,
    RunFinished,
    TrainingPhaseDone,
    data_of,
    last_of,
    read_events,
)
from laasp_ray.run.finishing import Delivered, deliver
from laasp_ray.run.state import advance, next_training_phase
from laasp_ray.run.totals import best_epoch, metrics_before, seconds_spent
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.compensating import Measured
from laasp_ray.search.executor import NO_EXECUTOR, Executor
from laasp_ray.store.artifact import save_pruned
from laasp_ray.store.checkpoint import (
    RACES,
    UNPRUNED,
    WEIGHTS,
    delete_checkpoints,
    delete_tensors,
    digest_of_file,
    has_checkpoint,
    load_checkpoint,
    load_tensors,
    numbered_name,
    save_checkpoint,
    save_tensors,
    unpruned_file,
)
from laasp_ray.store.journal import Journal, write_candidates
from laasp_ray.store.sparse import has_masks, load_masks, masks_file_of, save_masks
from laasp_ray.store.storage import Storage
from laasp_ray.train.loop import EpochResult, PhaseResult, TrainingPhase
from laasp_ray.train.trainer import Trainer


@dataclass(frozen=True)
class RunServices:
    """The services that the controller uses. `trainer` and `executor` are created on first use and then kept.

    The executor needs the calibration set drawn: it gets the images to leave out, and reports those that it could not
    read. `method` says what to prune next. `locate` says where the images of these names are in the data set. `attempt`
    is the driver's (store/ownership.py).
    """

    trainer: Callable[[], Trainer]
    executor: Callable[[tuple[str, ...], Callable[[str], None]], Executor]
    method: PruningMethod[Any]
    storage: Storage
    journal: Journal
    observers: Sequence[Observer]
    locate: Callable[[Sequence[str]], Mapping[str, Place]]
    attempt: int = 1


class Controller:
    """One run. `unpruned` has the initial weights. `state` is the fold of the journal so far."""

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
        self._has_teacher, self._memory = False, IterationMemory()
        self.state = state
        self._network, self._optimizer_state, self._masks = self._restore()

    def run(self) -> nn.Module:
        """Carries out the rest of the run. Returns the pruned network, on the CPU and in eval mode."""
        last: PhaseResult | None = None
        given = self.state.phase == "prune" or (not self._config.prunes and self._config.train.pretrained is not None)
        if given and self.state.iteration == 0 and not any(map(self._has, ("baseline", "training_phase"))):
            last = self._measure_given_weights()
        while self.state.phase != "done":
            if self.state.phase == "prune":
                self._iteration()
            else:
                last = self._train()
        return self._finish(last)

    def _has(self, name: str) -> bool:
        return self._parts.journal.last(name) is not None

    def _restore(self) -> tuple[NetworkState, Mapping[str, torch.Tensor], Mapping[str, bytes]]:
        """The network of the state, the optimizer's state (empty unless a training phase is unfinished), and
        the masks.
        """
        state, storage = self.state, self._parts.storage
        checkpoint = load_checkpoint(storage, state.checkpoint, state.digests)
        plan = Plan.empty() if state.checkpoint_plan is None else Plan.from_json(state.checkpoint_plan)
        network = NetworkState(plan, checkpoint.model)
        optimizer_state = checkpoint.optimizer_state if state.phase_epochs_done else {}
        self._measured = Measured(network)
        for step, file in zip(state.steps, state.weights, strict=True):
            network = self._pruned(network, Plan.from_json(step), load_tensors(storage, file, state.digests))
        self._memory.race.restore(load_tensors(storage, state.race, state.digests))
        has = masks_file_of(state.digests) is not None or has_masks(storage, state.iteration)
        masks = load_masks(storage, state.iteration, state.digests) if has else {}
        # A run cut off between an iteration and its first epoch has the weights from before the masks.
        return NetworkState(network.plan, masked(network.tensors, masks)), optimizer_state, masks

    def _pruned(self, network: NetworkState, step: Plan, weights: Mapping[str, torch.Tensor]) -> NetworkState:
        """The network after a prune, in which these tensors have new values. Keeps what moments are measured on."""
        model = rebuild(self._unpruned, network)
        apply_plan(model, step)
        after = capture(model, network.plan.then(step))
        after = NetworkState(after.plan, {**after.tensors, **weights})
        self._measured = self._measured.after(step, after)
        return after

    def _record(self, event: RunEvent) -> None:
        """Writes the event, then updates the state. A run killed in between finds the event when it is resumed."""
        self._parts.journal.append(event.NAME, data_of(event))
        self.state = advance(self.state, event, self._config)
        self._notify(event)

    def _notify(self, event: Happening) -> None:
        for observer in self._parts.observers:
            observer.on_event(event, self.state)

    def _measure_given_weights(self) -> PhaseResult:
        """Evaluates given weights before the first prune, if there was no training before it."""
        self._notify(PhaseStarted(phase="evaluate", detail="the weights given"))
        state = self.state
        phase = TrainingPhase(number=state.phases_done, phase="baseline", excluded=state.excluded, places=state.places)
        done = self._parts.trainer().run(self._network, {}, phase, self._epoch_done)
        self._exclude(done.unreadable)
        self._record(BaselineMeasured(metrics=done.metrics, loader=done.loader, seconds=done.seconds))
        return done

    def _iteration(self) -> None:
        started = time.perf_counter()
        parts, number = self._parts, self.state.iteration + 1
        self._notify(PhaseStarted(phase="prune", detail=parts.method.title(self._config.prune, number)))
        digests = self._keep_unpruned() if number == 1 else {}
        context = self._context(number)
        prepared = time.perf_counter() - started
        try:
            result = parts.method.iterate(context)
        except ExhaustedError as error:
            if "latency" not in self._config.prune.targets:
                raise
            self._record(Exhausted(reason=str(error)))
            return
        applied = time.perf_counter()
        digests |= self._apply(result, number)
        measured = measure_targets(self._unpruned, self._network, self._config)
        ended = time.perf_counter()
        seconds = {"prepare": prepared, **result.seconds, "apply": ended - applied, "total": ended - started}
        self._record(
            IterationDone(
                iteration=number,
                decision=result.decision,
                step=None if result.step is None else result.step.to_json(),
                kept_filters=kept_filters(self._network.plan, self._unpruned),
                candidates=len(result.ranking),
                seconds=seconds,
                reached=measured.shares,
                latency=measured.latency,
                ends_pruning=result.ends_pruning,
                details=result.details,
                text=result.text,
                digests=digests,
            )
        )

    def _keep_unpruned(self) -> dict[str, str]:
        """The digest of the unpruned network's file. What an earlier attempt wrote is written again, in case it was
        damaged since; the file of a run that begins with another's network comes from there.
        """
        storage = self._parts.storage
        if self._config.prune.begins_with is not None and has_checkpoint(storage, UNPRUNED):
            return digest_of_file(storage, unpruned_file())
        return save_checkpoint(storage, UNPRUNED, model=self._network.tensors)

    def _context(self, number: int) -> IterationContext[Any]:
        parts = self._parts
        executor: Executor = NO_EXECUTOR
        if parts.method.measures_losses:
            executor = parts.executor(self.state.excluded, lambda name: self._exclude((name,)))
        return IterationContext(
            model=rebuild(self._unpruned, self._network).eval(),
            network=self._network,
            example_input=self._example,
            baseline=self._baseline,
            config=self._config.prune,
            executor=executor,
            iteration=number,
            on_candidate=lambda done, total, latest: self._notify(
                CandidatesMeasured(iteration=number, done=done, total=total, latest=latest)
            ),
            masks=self._masks,
            memory=self._memory,
            measured=self._measured,
        )

    def _apply(self, result: IterationResult, number: int) -> dict[str, str]:
        """The network, the masks and the candidates' losses after an iteration; what is stored is before its event,
        which has the digests."""
        storage = self._parts.storage
        digests: dict[str, str] = {}
        if result.network is not None:
            self._network, self._measured = result.network, Measured(result.network)
        self._optimizer_state = {}
        if result.step is not None:
            self._network = self._pruned(self._network, result.step, result.weights)
        for folder, tensors in ((WEIGHTS, result.weights), (RACES, self._memory.race.tensors())):
            digests |= save_tensors(storage, folder, number, tensors, self._parts.attempt)
        if result.masks is not None:
            digests |= save_masks(storage, number, result.masks, self._parts.attempt)
            self._masks = result.masks
        if result.ranking:
            digests |= write_candidates(storage, number, result.ranking)
        return digests

    def _train(self) -> PhaseResult:
        started = time.perf_counter()
        phase, parts = replace(next_training_phase(self.state, self._config), masks=self._masks), self._parts
        began = self.state.epochs_trained - self.state.phase_epochs_done
        self._notify(PhaseStarted(phase=phase.phase, detail=f"{len(phase.epochs) - phase.done} epochs"))
        try:
            done = self._trainer().run(self._network, self._optimizer_state, phase, self._epoch_done)
        except TrainingError as error:
            good = f"checkpoints/{self.state.checkpoint}.safetensors"
            raise TrainingError(f"{error}; last good checkpoint: {parts.storage.uri}/{good}") from error
        self._exclude(done.unreadable)
        self._optimizer_state = {}
        self._record(
            TrainingPhaseDone(
                phase=self.state.phase,
                training_phase=phase.number,
                metrics=done.metrics,
                loader=done.loader,
                seconds=time.perf_counter() - started,
                evaluation_seconds=done.seconds,
            )
        )
        if self._config.train.keep_checkpoints:
            delete_checkpoints(
                parts.storage, keep=[self.state.checkpoint, UNPRUNED], attempt=parts.attempt, since=began
            )
        return done

    def _trainer(self) -> Trainer:
        """The trainer. If the run distils, its teacher is the network from before the first prune."""
        trainer = self._parts.trainer()
        if self._config.train.distill and self.state.iteration and not self._has_teacher:
            teacher = load_checkpoint(self._parts.storage, UNPRUNED, self.state.digests)
            trainer.set_teacher(NetworkState(Plan.empty(), teacher.model))
            self._has_teacher = True
        return trainer

    def _epoch_done(self, done: EpochResult) -> None:
        state, plan, parts = self.state, done.plan, self._parts
        before = state.checkpoint
        self._network = NetworkState(self._network.plan, done.tensors)
        self._measured, self._optimizer_state = Measured(self._network), done.optimizer_state
        self._memory.race.forget()
        name = numbered_name(state.epochs_trained, parts.attempt)
        digests = save_checkpoint(parts.storage, name, model=done.tensors, optimizer_state=done.optimizer_state)
        self._exclude(done.unreadable)
        self._record(
            EpochDone(
                phase=state.phase,
                training_phase=state.phases_done,
                epoch=plan.epoch,
                position=done.position + 1,
                epochs=len(next_training_phase(state, self._config).epochs),
                epochs_trained=state.epochs_trained + 1,
                learning_rate=plan.learning_rate,
                loss=done.loss,
                top1=done.top1,
                images=done.images,
                metrics=done.metrics,
                seconds=done.seconds,
                test_seconds=done.test_seconds,
                checkpoint=name,
                digests=digests,
            )
        )
        # If this event is found cut off later, the run goes on from the epoch before.
        keep = [name, UNPRUNED, *([before] if before else [])]
        began = state.epochs_trained - state.phase_epochs_done if self._config.train.keep_checkpoints else None
        delete_checkpoints(parts.storage, keep=keep, attempt=parts.attempt, since=began)
        if not self._config.train.keep_checkpoints:
            delete_tensors(parts.storage, keep=[*state.weights, state.race], attempt=parts.attempt)

    def _exclude(self, names: tuple[str, ...]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.state.excluded]
        places = self._parts.locate(new) if new else {}
        for name in new:
            excluded = ImageExcluded(image=name, reason="cannot be read or decoded")
            if name in places:
                place = places[name]
                excluded = replace(excluded, split=place.split, index=place.index, label=place.label)
            self._record(excluded)
        bound = self._config.data.max_unreadable
        if len(self.state.excluded) > bound:
            raise DataError(
                f"{len(self.state.excluded)} images cannot be read or decoded, the last {self.state.excluded[-1]}; at "
                f"most {bound} may be left out: go on without them with a higher data.max_unreadable, or repair them "
                "and start a run under another --name"
            )

    def _finish(self, last: PhaseResult | None) -> nn.Module:
        parts = self._parts
        if not self._config.prunes:
            save_checkpoint(parts.storage, UNPRUNED, model=self._network.tensors)
        model = rebuild(self._unpruned, self._network).eval()
        events = read_events(parts.journal)
        # If the run was killed after its last training phase, only the journal has the phase's metrics.
        metrics = last.metrics if last is not None else last_of(events, TrainingPhaseDone).metrics
        macs = macs_after(self._baseline.macs, self._network.plan)
        targets = self._config.prune.targets
        summary = RunFinished(
            macs=macs,
            macs_unpruned=self._baseline.macs.total,
            macs_convention=self._baseline.macs.convention,
            flops_reduction=1 - macs / self._baseline.macs.total,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            parameters_unpruned=sum(parameter.numel() for parameter in self._unpruned.parameters()),
            parameters_reduction=self.state.parameters_reduction if "parameters" in targets else None,
            latency_reduction=self.state.latency_reduction if "latency" in targets else None,
            metrics=metrics,
            best=best_epoch(events),
            seconds=seconds_spent(events),
        )
        made = deliver(
            self._config, self._unpruned, model, self._network.plan, record=self._record, notify=self._notify
        )
        details = self._save(model, summary, made, metrics_before(events))
        self._record(replace(summary, details=details, text=self._result(summary, details)))
        return model

    def _save(
        self, model: nn.Module, summary: RunFinished, made: Delivered, before: Metrics | None
    ) -> Mapping[str, Any]:
        """Writes the finished network and the method's report. Returns the details for the last event."""
        storage = self._parts.storage
        finished = FinishedNetwork(config=self._config, model=model, example_input=self._example, masks=self._masks)
        report = self._parts.method.report(finished) if self._config.prunes else MethodReport()
        for name, content in report.files.items():
            storage.write(name, content)
        written = save_pruned(
            storage.child("pruned"),
            model=model,
            model_config=self._config.model,
            plan=self._network.plan,
            metrics={
                **data_of(replace(summary, details=report.details)),
                "export": to_json(made.exports),
                "latency": to_json(made.latency),
            },
            masks=self._masks,
            files={CARD: model_card(self._config, summary, before, made).encode(), **made.files},
        )
        return {**report.details, "weights_bytes": written}

    def _result(self, summary: RunFinished, details: Mapping[str, Any]) -> str:
        if not self._config.prunes:
            return "trained, nothing pruned"
        reached = {of: getattr(summary, TARGETS[of]) for of in {"FLOPs": 0.0} | self._config.prune.targets}
        gone = "pruned by " + ", ".join(f"{share:.2%} of {of}" for of, share in reached.items())
        return self._parts.method.result(details) or gone
