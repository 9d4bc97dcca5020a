"""The parts of a run, counted before it starts: epochs, evaluations, and the cost of pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.methods.estimate import Estimate
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork
from laasp_ray.methods.registry import method_of
from laasp_ray.pruning.network import rebuild
from laasp_ray.records import Phase
from laasp_ray.run.preflight import Prepared
from laasp_ray.run.state import initial_state, next_training_phase
from laasp_ray.train.loop import EpochPlan


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`epochs` by phase, and the number of `evaluations` on the test images.

    Evaluations are made before the first prune, after each fine-tune, at the end, and between epochs before and after
    pruning as `train.test_every` says. `pruning` is None if the run prunes nothing. The losses of an iteration are
    measured on `calibration_images`.
    """

    epochs: Mapping[str, int]
    evaluations: int
    calibration_images: int = 0
    pruning: Estimate | None = None


def workload_of(prepared: Prepared) -> Workload:
    """The parts of the whole run, even if some are done already. Raises ConfigError if the method has no estimate."""
    config = prepared.config
    images, pruning = 0, None
    if config.prunes:
        method = method_of(config)
        images = min(config.search.images, len(prepared.train)) if method.measures_losses else 0
        network = UnprunedNetwork(
            config=config, model=prepared.unpruned, example_input=prepared.example_input, task=prepared.task
        )
        preparation = Preparation(baseline=prepared.baseline, begun_with=prepared.begun_with)
        pruning = method.estimate(network, preparation, images)
    fine_tunes = 0 if pruning is None else pruning.fine_tunes
    return Workload(
        epochs=_epochs(config, fine_tunes),
        evaluations=_evaluations(config, fine_tunes),
        calibration_images=images,
        pruning=pruning,
    )


def network_of(prepared: Prepared) -> nn.Module:
    """The network that the run begins with: the unpruned one, or the pruned network of the run in `prune.from_run`."""
    begun_with = prepared.begun_with
    return prepared.unpruned if begun_with is None else rebuild(prepared.unpruned, begun_with)


def _epochs(config: RunConfig, fine_tunes: int) -> dict[str, int]:
    """Epochs by phase, for a run with `fine_tunes` fine-tunes."""
    training_phases = _training_phases(config)
    return {
        "train": len(training_phases.get("train", ())),
        "fine-tune": fine_tunes * config.prune.fine_tune_epochs,
        "final": len(training_phases["final"]),
    }


def _evaluations(config: RunConfig, fine_tunes: int) -> int:
    """The number of evaluations on the test images, for a run with `fine_tunes` fine-tunes.

    The evaluation at the end of a training phase follows its last epoch, so that epoch has no other one.
    """
    between = sum(
        config.train.is_tested(plan.epoch) for epochs in _training_phases(config).values() for plan in epochs[:-1]
    )
    before = config.prunes or config.train.pretrained is not None
    return before + fine_tunes + between + 1


def _training_phases(config: RunConfig) -> dict[Phase, tuple[EpochPlan, ...]]:
    """The epochs of the training phases before and after pruning."""
    first = initial_state(config)
    phases: tuple[Phase, ...] = ("train", "final") if first.phase == "train" else ("final",)
    return {phase: next_training_phase(replace(first, phase=phase), config).epochs for phase in phases}
