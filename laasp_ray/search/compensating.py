"""Compensation in a run: the moments of the network that was trained last, and what follows for every later prune."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from laasp_ray.config import Compensate
from laasp_ray.criteria.obs import ReadFilters, missed_least, scores_from
from laasp_ray.pruning.channels import ChannelAxis, Removal
from laasp_ray.pruning.compensation import MadeUp
from laasp_ray.pruning.coupling import Coupling
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.moments import GROWTH, RIDGE, Moments, has_few_patches, inverted
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.norms import norms_after
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.readers import Reader, losses_of, readers_of
from laasp_ray.search.grams import Grams

logger = logging.getLogger(__name__)

MOST_STEPS = 8
"""After so many prunes without training in between moments are measured anew: each prune changes those behind it."""

Measure = Callable[[NetworkState, Sequence[Reader]], Grams]


@dataclass(frozen=True)
class Measured:
    """The network that moments are measured on, and the prunes since then."""

    network: NetworkState
    steps: tuple[Plan, ...] = ()

    def after(self, step: Plan, network: NetworkState) -> Measured:
        """What moments are measured on once `step` has made `network`: that network itself after MOST_STEPS prunes."""
        steps = (*self.steps, step)
        return Measured(network) if len(steps) == MOST_STEPS else Measured(self.network, steps)


class CompensationMemory:
    """The moments of the last trained network's readers, brought up to date prune by prune.

    They are a function of that network and the prunes since: a run that goes on after an interruption measures them
    again and has the same.
    """

    def __init__(self) -> None:
        self._measured: Measured | None = None
        self._moments: dict[str, tuple[Reader, Moments]] = {}
        self._norms: dict[str, str] | None = None
        self._reasons: dict[str, str] = {}
        self._unread: set[str] = set()
        self._few: set[str] = set()
        self._orders: dict[str, _Known] = {}

    def at(
        self, model: nn.Module, graph: PruningGraph, mode: Compensate, measured: Measured, measure: Measure
    ) -> Compensator:
        """What compensates prunes of `model`, which is `measured.network` after `measured.steps`.

        With mode `off`, for obs alone, moments are as for `full`.
        """
        if self._norms is None:
            self._norms = norms_after(model)
        widths = {
            name.removesuffix(".weight"): tensor.shape[1]
            for name, tensor in measured.network.tensors.items()
            if name.endswith(".weight") and tensor.ndim > 1
        }
        readers, reasons = readers_of(graph, model, mode, widths)
        self._say_not_compensated(reasons)
        for reader in readers.values():
            if reader.mixed and mode != "channels" and reader.layer not in self._moments:
                logger.info("%s has too many inputs: one mix of channels serves all taps of its kernel", reader.layer)
        self._bring_up(readers, widths, measured, measure)
        readers = {layer: reader for layer, reader in readers.items() if layer not in self._unread}
        moments = {layer: self._moments[layer][1] for layer in readers}
        return Compensator(readers, moments, self._norms, self._orders)

    def _bring_up(
        self, readers: Mapping[str, Reader], widths: Mapping[str, int], measured: Measured, measure: Measure
    ) -> None:
        known = self._measured
        if known is None or known.network is not measured.network or measured.steps[: len(known.steps)] != known.steps:
            self._moments.clear()
            self._orders.clear()
            known = Measured(measured.network)
        for step in measured.steps[len(known.steps) :]:
            self._moments = {layer: _after(*pair, step) for layer, pair in self._moments.items()}
        new = [
            reader
            for layer, reader in readers.items()
            if layer not in self._unread and (layer not in self._moments or self._moments[layer][0] != reader)
        ]
        missing = [reader.with_columns(widths[reader.layer]) for reader in new]
        if missing:
            grams, few = dict(measure(measured.network, missing)), []
            unread: dict[str, str] = {}
            for reader in missing:
                gram = grams.pop(reader.layer)  # as large as its inverse: let go of when that is there
                if gram.patches and has_few_patches(gram):
                    few.append(reader.layer)
                if not gram.patches:
                    unread[reader.layer] = "it is not called as a module of its own"
                    continue
                pair = reader, inverted(gram, reader.layer)
                for step in measured.steps:
                    pair = _after(*pair, step)
                self._moments[reader.layer] = pair
            self._say_few(few, len(missing))
            self._say_not_compensated(unread)
            self._unread |= unread.keys()
        self._measured = measured

    def _say_not_compensated(self, reasons: Mapping[str, str]) -> None:
        """One line for each reason, with the layers that it is new for."""
        new: dict[str, list[str]] = {}
        for layer, reason in reasons.items():
            if layer not in self._reasons:
                new.setdefault(reason, []).append(layer)
        for reason, layers in new.items():
            logger.info("not compensated because %s: %s", reason, ", ".join(layers))
        self._reasons |= reasons

    def _say_few(self, layers: Sequence[str], of: int) -> None:
        """One line for all layers, and again only where there are others."""
        if not set(layers) <= self._few:
            named = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
            logger.info(
                "%d of %d layers have fewer patches of their inputs than inputs (%s), so that their ridge is %g; more "
                "calibration images (search.images) give more",
                len(layers),
                of,
                named,
                RIDGE * GROWTH,
            )
        self._few |= set(layers)


def _after(reader: Reader, moments: Moments, step: Plan) -> tuple[Reader, Moments]:
    lost = reader.taken_by(step)
    return (reader.after(step), moments.without(lost)) if any(lost) else (reader, moments)


@dataclass(frozen=True)
class _Known:
    """An order of filters, with all that it was computed from."""

    count: int
    readers: tuple[ReadFilters, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Compensator:
    """What compensates prunes of one network."""

    readers: Mapping[str, Reader]
    moments: Mapping[str, Moments]
    norms: Mapping[str, str]
    orders: dict[str, _Known] = field(default_factory=dict)

    def made_up(self, removal: Removal) -> MadeUp:
        """How the readers make up for the channels that a prune takes from them."""
        return {
            layer: self.moments[layer].compensation(self.readers[layer], lost)
            for layer, lost in losses_of(self.readers, removal).items()
            if any(lost)
        }

    def obs_scores(self, model: nn.Module, graph: PruningGraph, counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Layer -> scores of its filters by obs, of which the `counts` lowest are meant. Of layers with one choice (a
        residual stream's) the first has it. Layers that obs cannot score have none: nothing reads
        them, or a layer does that cannot be compensated, or that has more inputs of one filter than of another.
        """
        for layer in self.orders.keys() - {layer for layer, count in counts.items() if count}:
            del self.orders[layer]
        scores: dict[str, torch.Tensor] = {}
        seen: set[frozenset[int]] = set()
        for layer, count in counts.items():
            coupling = graph.couplings[layer]
            classes = frozenset(coupling.own.tolist())
            if count == 0 or classes in seen:
                continue
            seen.add(classes)
            readers = tuple(self._reads(model, coupling))
            if not readers:
                continue
            known = self.orders.get(layer)
            if known is None or known.count != count or not _same(known.readers, readers):
                order = missed_least(readers, graph.layers[layer].filters, count, graph.layers[layer].blocks)
                known = self.orders[layer] = _Known(count, readers, tuple(order))
            scores[layer] = scores_from(known.order, graph.layers[layer].filters)
        return scores

    def _reads(self, model: nn.Module, coupling: Coupling) -> list[ReadFilters]:
        found: list[ReadFilters] = []
        for side, channels in coupling.sides.items():
            if side.role != "inputs":
                continue
            if side.module not in self.readers:
                return []  # what this layer would miss is not known
            of_groups = self._inputs(side, channels)
            if of_groups is None:
                return []
            weights = self._scaled(model, side.module)
            for group, inputs in enumerate(of_groups):
                if inputs:
                    found.append(
                        ReadFilters(
                            torch.tensor(list(inputs)),
                            torch.tensor(list(inputs.values())),
                            weights[group],
                            self.moments[side.module].inverse[group][:-1, :-1],
                        )
                    )
        return found

    def _inputs(self, side: ChannelAxis, channels: Mapping[int, tuple[int, ...]]) -> list[dict[int, list[int]]] | None:
        """Filter -> its inputs, for each group of a reader. None if the filters of a group have unequal numbers."""
        reader = self.readers[side.module]
        groups: list[dict[int, list[int]]] = [{} for _ in range(reader.groups)]
        for index, some in channels.items():
            for group, inputs in enumerate(reader.of_channels(some)):
                if inputs:
                    groups[group][index] = inputs
        if any(len({len(inputs) for inputs in group.values()}) > 1 for group in groups):
            return None
        return groups

    def _scaled(self, model: nn.Module, layer: str) -> torch.Tensor:
        """The reader's weights float64 (groups, rows, inputs), as the BatchNorm after it scales its outputs."""
        reader = self.readers[layer]
        weight = model.get_submodule(layer).get_parameter("weight").detach().double().cpu()
        if layer in self.norms:
            norm = model.get_submodule(self.norms[layer])
            assert isinstance(norm, _BatchNorm)
            scale = (norm.get_buffer("running_var").double().cpu() + norm.eps).rsqrt()
            if norm.affine:
                scale = scale * norm.weight.detach().double().cpu()
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        parts = weight.reshape(reader.groups, weight.shape[0] // reader.groups, reader.inputs, reader.sharing)
        return parts.transpose(2, 3).flatten(1, 2)


def _same(one: Sequence[ReadFilters], other: Sequence[ReadFilters]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.filters, b.filters)
        and torch.equal(a.inputs, b.inputs)
        and torch.equal(a.weights, b.weights)
        and a.inverse.data_ptr() == b.inverse.data_ptr()
        and a.inverse.shape == b.inverse.shape
        for a, b in zip(one, other, strict=True)
    )
