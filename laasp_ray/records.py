"""The plain values that travel between the rooms, each with a JSON form.

Nothing here knows torch, Ray, a clock or a disk. Indices of filters are in the coordinates of the network as it stands
before the prune they describe, unless a name says `original`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One prune that could be made: these filters of this layer, with all that is coupled to them.

    `also` names the other (layer, criterion) pairs whose prune removes the same channels everywhere, of the same layer
    or of one that is coupled to it: they are the same candidate, evaluated once.
    """

    layer: str
    criterion: str
    filters: tuple[int, ...]
    flops_reduction: float
    also: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.layer} by {self.criterion} ({len(self.filters)} filters)"


@dataclass(frozen=True)
class MeasuredLoss:
    """A network's mean cross-entropy over `images` of the calibration set's images; NaN or inf is never chosen.

    If a race dropped it in round `dropped_at` (from 1), or was decided before all images were needed, `loss` is a
    stratified estimate from these. `error`: why there is no loss (NaN). `copied`: why a pruned copy was measured
    instead of a mask.
    """

    loss: float
    images: int
    seconds: float = 0.0
    dropped_at: int | None = None
    error: str = ""
    copied: str = ""


@dataclass(frozen=True, kw_only=True)
class CandidateLoss:
    """A candidate, and what was measured of the network without its filters."""

    candidate: Candidate
    measured: MeasuredLoss

    @property
    def layer(self) -> str:
        return self.candidate.layer

    @property
    def criterion(self) -> str:
        return self.candidate.criterion

    @property
    def filters(self) -> tuple[int, ...]:
        return self.candidate.filters

    @property
    def flops_reduction(self) -> float:
        """Share of the unpruned network's multiply-accumulates that is gone after this prune."""
        return self.candidate.flops_reduction

    @property
    def loss(self) -> float:
        return self.measured.loss

    @property
    def images(self) -> int:
        return self.measured.images

    @property
    def seconds(self) -> float:
        return self.measured.seconds

    @property
    def dropped_at(self) -> int | None:
        return self.measured.dropped_at

    @property
    def error(self) -> str:
        return self.measured.error

    @property
    def copied(self) -> str:
        return self.measured.copied


class Ranking(Sequence[CandidateLoss]):
    """Candidates with their losses, least loss first; ties keep the order in which they were proposed.

    Those that a race dropped come after those that it did not.
    """

    def __init__(self, entries: Sequence[CandidateLoss]) -> None:
        """`entries` in the order of proposal: layers in network order, criteria in the pool's order."""

        def key(position: int) -> tuple[bool, bool, float, int]:
            loss = entries[position].loss
            finite = math.isfinite(loss)
            return (not finite, entries[position].dropped_at is not None, loss if finite else 0.0, position)

        self._entries = tuple(entries[position] for position in sorted(range(len(entries)), key=key))

    @overload
    def __getitem__(self, index: int) -> CandidateLoss: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CandidateLoss]: ...
    def __getitem__(self, index: int | slice) -> CandidateLoss | Sequence[CandidateLoss]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CandidateLoss]:
        return iter(self._entries)

    def rank_of(self, layer: str, criterion: str) -> int:
        """1-based rank of the candidate that this layer and criterion proposed, shared proposals included.

        Raises KeyError if there is none.
        """
        for rank, entry in enumerate(self._entries, 1):
            if (layer, criterion) in ((entry.layer, entry.criterion), *entry.candidate.also):
                return rank
        raise KeyError(f"no candidate of layer {layer!r} by {criterion!r} in this ranking")


@dataclass(frozen=True, kw_only=True)
class LayerPrune:
    """These filters of one layer, and the criterion that picked them."""

    layer: str
    criterion: str
    filters: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The prune that an iteration chose.

    `filters` of `layer`, picked by `criterion`, and what is pruned together with them: with method pls the other
    layers, in network order, with several prunes in an iteration the next best. The losses, before and after, and
    `flops_reduction` are those of all of it.
    """

    iteration: int
    layer: str
    criterion: str
    filters: tuple[int, ...]
    loss: float
    loss_before: float
    flops_reduction: float
    also: tuple[tuple[str, str], ...] = ()
    further: tuple[LayerPrune, ...] = ()

    @property
    def prunes(self) -> tuple[LayerPrune, ...]:
        """All of it, layer by layer."""
        return (LayerPrune(layer=self.layer, criterion=self.criterion, filters=self.filters), *self.further)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What an evaluation over a data set gave; `images` counts each image once."""

    loss: float
    top1: float
    top5: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """An image that was left out: its number `index` among those that the `split` had at the run's start."""

    name: str
    split: Literal["train", "test"]
    index: int
    label: int


Phase = Literal["train", "prune", "fine-tune", "final", "done"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands: the fold of its journal (see run/controller.py).

    `plan` is the JSON form of the composed plan (pruning/plan.py) against the unpruned network. `checkpoint` names the
    weights in the store; `checkpoint_plan` is the plan of the network they belong to, and `steps` are the prunes made
    since, to be replayed onto them. `phase_epochs_done` counts the finished epochs of the
    training phase that is under way; `epochs_trained` all epochs since the start, and thereby numbers the order and
    augmentation of the next one. `excluded` names the images that are left out, `places` says where they are: they
    may be removed. `digests` (file -> sha256) are of the checkpoints and masks that the run stands on, as far as its
    events tell them. The reductions of parameters and latency are 0 as long as they are no targets.
    """

    phase: Phase = "train"
    iteration: int = 0
    phases_done: int = 0
    phase_epochs_done: int = 0
    epochs_trained: int = 0
    flops_reduction: float = 0.0
    parameters_reduction: float = 0.0
    latency_reduction: float = 0.0
    fine_tuned_at: float = 0.0
    plan: Mapping[str, Any] | None = None
    checkpoint: str = "initial"
    checkpoint_plan: Mapping[str, Any] | None = None
    steps: tuple[Mapping[str, Any], ...] = ()
    excluded: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> dict[str, float]:
        """What is gone of the unpruned network, by what a target may be of (config.TARGETS)."""
        return {
            "FLOPs": self.flops_reduction,
            "parameters": self.parameters_reduction,
            "latency": self.latency_reduction,
        }


def to_json(value: Any) -> Any:
    """Dataclasses, mappings and sequences as what `json.dumps` takes; non-finite floats as strings ('nan', 'inf')."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form here")
