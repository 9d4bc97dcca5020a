"""The methods: what to prune next, given the network as it stands. One seam, a turn of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from laasp_ray.config import Method, PruneConfig
from laasp_ray.methods import laasp, pls
from laasp_ray.methods.turn import OnCandidate, Turn
from laasp_ray.pruning.network import NetworkState
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.executor import Executor


class TakeTurn(Protocol):
    def __call__(
        self,
        model: nn.Module,
        network: NetworkState,
        example_input: torch.Tensor,
        baseline: Baseline,
        config: PruneConfig,
        executor: Executor,
        *,
        turn: int,
        on_candidate: OnCandidate,
    ) -> Turn:
        """Chooses what goes next from `model`, which is `network` rebuilt; changes nothing. `turn` counts from 1."""


METHODS: Mapping[Method, TakeTurn] = {"laasp": laasp.take_turn, "pls": pls.take_turn}
