"""What a run consists of, counted before it starts: epochs, evaluations, and what its method's pruning takes."""

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
    """`epochs` by phase, and `evaluations` on the test images: before the first prune, after each fine-tuning, at the
    end, and between the epochs before and after pruning as `train.test_every` says.

    `pruning` is None of a run that prunes nothing. The losses of an iteration are over `calibration_images`.
    """

    epochs: Mapping[str, int]
    evaluations: int
    calibration_images: int = 0
    pruning: Estimate | None = None


def workload_of(prepared: Prepared) -> Workload:
    """The whole run's, whatever of it may be done already. Raises ConfigError where its method cannot tell."""
    config = prepared.config
    images, pruning = 0, None
    if config.prunes:
        method = method_of(config)
        images = min(config.search.images, len(prepared.train)) if method.measures_losses else 0
        network = UnprunedNetwork(config=config, model=prepared.unpruned, example_input=prepared.example_input)
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
    """What the run begins with: the unpruned network, or the pruned one of the run that it goes on with."""
    begun_with = prepared.begun_with
    return prepared.unpruned if begun_with is None else rebuild(prepared.unpruned, begun_with)


def _epochs(config: RunConfig, fine_tunes: int) -> dict[str, int]:
    """By phase, of a run with so many fine-tunings."""
    training_phases = _training_phases(config)
    return {
        "train": len(training_phases.get("train", ())),
        "fine-tune": fine_tunes * config.prune.fine_tune_epochs,
        "final": len(training_phases["final"]),
    }


def _evaluations(config: RunConfig, fine_tunes: int) -> int:
    """On the test images, of a run with so many fine-tunings; the last epoch of a training phase is followed by one
    anyway."""
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
