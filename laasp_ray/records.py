"""Plain values that the packages exchange, each with a JSON form.

This module does not use torch, Ray, a clock or a disk. Filter indices refer to the network just before the prune that
they describe, unless a name says `original`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible prune: filters of one layer, with all channels that are coupled to them.

    `also` lists the other (layer, criterion) pairs that propose the same prune: the same channels are removed
    everywhere. Their layer is this one or one coupled to it. The candidate is evaluated once for all of them.
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
    """The mean loss of a network over `images` of the calibration set. A loss of NaN or inf is never chosen.

    `loss` is an estimate if a race dropped the candidate in round `dropped_at` (from 1), or if the race was decided
    before all images were used. `error` says why there is no loss (NaN). `copied` says why a pruned copy was measured
    instead of a masked network.
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
        """Share of the unpruned network's multiply-accumulates that is removed after this prune."""
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
    """Candidates with their losses, lowest loss first. Ties keep the order of proposal.

    Candidates that a race dropped come last.
    """

    def __init__(self, entries: Sequence[CandidateLoss]) -> None:
        """`entries` are in the order of proposal: layers in network order, and criteria in the pool's order."""

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
        """1-based rank of the candidate that this layer and criterion proposed; a shared proposal counts for each pair.

        Raises KeyError if there is none.
        """
        for rank, entry in enumerate(self._entries, 1):
            if (layer, criterion) in ((entry.layer, entry.criterion), *entry.candidate.also):
                return rank
        raise KeyError(f"no candidate of layer {layer!r} by {criterion!r} in this ranking")


@dataclass(frozen=True, kw_only=True)
class LayerPrune:
    """The pruned filters of one layer, and the criterion that chose them."""

    layer: str
    criterion: str
    filters: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The prune that an iteration chose.

    `criterion` chose the `filters` of `layer`. `further` are the prunes made together with it: the other layers in
    network order (method pls), or the next best candidates (several prunes in an iteration). The losses before and
    after and `flops_reduction` are for all of them together.
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
        """All prunes of the decision, one per layer."""
        return (LayerPrune(layer=self.layer, criterion=self.criterion, filters=self.filters), *self.further)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The result of an evaluation on a data set. `images` counts each image once.

    Classification has `top1` and `top5` (0 to 1). A loss of the user's own has `values` by the names of its metrics
    instead; the first is the primary one, and `better` says which values of it are. Without metrics it is the loss.
    """

    loss: float
    top1: float | None = None
    top5: float | None = None
    images: int
    values: Mapping[str, float] = field(default_factory=dict)
    better: Literal["higher", "lower"] = "higher"

    @property
    def primary(self) -> tuple[str, float]:
        """The name and the value of what networks are compared by."""
        if self.top1 is not None:
            return "top1", self.top1
        return next(iter(self.values.items()), ("loss", self.loss))

    @property
    def score(self) -> float:
        """The primary value so that higher is better; -inf if it is NaN."""
        value = self.primary[1] if self.better == "higher" else -self.primary[1]
        return -math.inf if math.isnan(value) else value

    @property
    def named(self) -> dict[str, float]:
        """All values by name, without the loss, the primary one first."""
        shares = {"top1": self.top1, "top5": self.top5}
        return {name: value for name, value in shares.items() if value is not None} | dict(self.values)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of an image that was left out: its `index` in the `split`, as the split was at the run's start."""

    name: str
    split: Literal["train", "test"]
    index: int
    label: int


Phase = Literal["train", "prune", "fine-tune", "final", "done"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run: the fold of its journal (see run/state.py).

    `plan` is the JSON form of the composed plan (pruning/plan.py), relative to the unpruned network. `checkpoint` names
    the weights in the store, and `checkpoint_plan` is the plan of the network that they belong to. `steps` are the
    prunes made since then, which are replayed on these weights; each has a file of `weights` that are new after it, or
    an empty name. `race` is the file of what the last race left to the next one, if nothing was trained since.
    `phase_epochs_done` counts the finished epochs of the current training phase. `epochs_trained` counts all epochs
    since the start; it seeds the order and augmentation of the next epoch. `excluded` names the images that are left
    out, and `places` says where they are, because they may be deleted later. `digests` (file -> sha256) are those of
    the checkpoints and masks in use, as far as events tell them. The reductions of parameters and latency are 0 unless
    they are targets. `batch_parts` is the number of parts of a global batch.
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
    weights: tuple[str, ...] = ()
    race: str = ""
    excluded: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    batch_parts: int = 1

    @property
    def reached(self) -> dict[str, float]:
        """The reduction so far for each quantity that a target can have (config.TARGETS)."""
        return {
            "FLOPs": self.flops_reduction,
            "parameters": self.parameters_reduction,
            "latency": self.latency_reduction,
        }


def to_json(value: Any) -> Any:
    """Converts dataclasses, mappings and sequences to values that `json.dumps` accepts. Non-finite floats become the
    strings 'nan', 'inf' and '-inf'.
    """
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
