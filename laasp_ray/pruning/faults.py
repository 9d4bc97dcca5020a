"""The check of every layer's coupling by runs of the network (verify.py), and what runs of it need."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from laasp_ray.errors import MemoryShortError, PruningError, is_out_of_memory
from laasp_ray.pruning.channels import ChannelAxis, unite
from laasp_ray.pruning.coupling import Coupling, Couplings
from laasp_ray.pruning.flow import tensors_of
from laasp_ray.pruning.verify import fault_of

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_ATTEMPTS = 3
"""The number of attempts to run the network when memory runs out. Other programs may free memory meanwhile."""

_DRAWS = 3
"""The number of random sets of each layer's filters that are tried if the network cuts and joins its channels. The
first has one filter of each block, the others half of them; any one set may be right by chance. Other networks get the
first two.
"""

_TRIES = 8
"""The number of attempts to draw a set of filters that leaves some filters in every layer."""


def retried(run: Callable[[], _Result]) -> _Result:
    """The result of `run`, repeated if memory runs out. A shortage of memory does not mean that a layer cannot be
    pruned.

    Raises MemoryShortError if memory always runs out.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("memory ran out while the network was looked at (attempt %d): %s", attempt + 1, reason)
        gc.collect()
    raise MemoryShortError(
        f"memory ran out {_ATTEMPTS} times while the network was looked at ({reason}): free some on the driver's "
        "machine"
    )


@torch.no_grad()
def check_repeatable(probe: nn.Module, example: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """Raises PruningError if two runs in eval mode give different outputs, because nothing can be compared then."""
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)  # the second run must get other random numbers than the first
        again = list(tensors_of(probe(example)))
    pairs = zip(outputs, again, strict=False)
    if any(not torch.equal(one, other) and not bool(one.isnan().any()) for one, other in pairs):
        raise PruningError(
            "the network is not deterministic in eval mode: two runs on the same input give different outputs; leave "
            "noise and dropout to training mode (if self.training)"
        )


def faults_of(
    probe: nn.Module, example: torch.Tensor, found: Couplings, couplings: Mapping[str, Coupling]
) -> dict[str, str]:
    """Layers whose removal has a wrong effect -> the fault. All layers are tried together; if that fails, halves are
    tried.
    """
    faults: dict[str, str] = {}

    def fault_in(layers: Sequence[str], draw: int) -> str | None:
        """Tries layers that share channels with others after those."""
        while layers:
            joint: dict[ChannelAxis, set[int]] = {}
            gone, left = np.zeros(int(found.classes.max()) + 1, bool), []
            for name in layers:
                coupling = couplings[name]
                if gone[coupling.own].any():
                    left.append(name)
                    continue
                filters = _some(coupling, f"{name}{draw}", half=draw > 0)
                unite(joint, coupling.removal(filters))
                gone[coupling.classes(filters)] = True
            fault = _tried(probe, example, joint, found, gone[found.classes])
            if fault is not None:
                return fault
            layers = left
        return None

    def search(layers: Sequence[str]) -> None:
        faults_found = (fault_in(layers, draw) for draw in range(_DRAWS if found.cut else 2))
        fault = next((fault for fault in faults_found if fault is not None), None)
        if fault is not None and len(layers) == 1:
            faults[layers[0]] = fault
        elif fault is not None:
            search(layers[: len(layers) // 2])
            search(layers[len(layers) // 2 :])

    # Layers that share all their channels (as in a residual stage) have the same result.
    alike: dict[bytes, list[str]] = {}
    for name, coupling in couplings.items():
        alike.setdefault(np.unique(coupling.own).tobytes(), []).append(name)
    search([names[0] for names in alike.values()])
    return {name: faults[names[0]] for names in alike.values() if names[0] in faults for name in names}


def _tried(
    probe: nn.Module, example: torch.Tensor, removal: dict[ChannelAxis, set[int]], found: Couplings, gone: np.ndarray
) -> str | None:
    return retried(lambda: fault_of(probe, example, removal, found.meetings, gone))


def _some(coupling: Coupling, seed: str, *, half: bool) -> list[int]:
    """Random filters of each block: half of them, or one. If possible, every coupled layer keeps some filters."""
    width, draw = len(coupling.own) // coupling.blocks, random.Random(seed)
    count = max(1, width // 2) if half else 1
    for _ in range(_TRIES):
        filters = [
            block * width + index
            for block in range(coupling.blocks)
            for index in sorted(draw.sample(range(width), count))
        ]
        if all(len(gone) < side.size for side, gone in coupling.removal(filters).items()):
            break
        count = max(1, count // 2)
    return filters
