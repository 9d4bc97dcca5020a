"""The methods: what to prune next, given the network as it stands. One seam, a turn of each."""

from __future__ import annotations

from collections.abc import Mapping

from laasp_ray.config import Method
from laasp_ray.methods import laasp, pls
from laasp_ray.methods.base import Standing, TakeTurn, Turn

__all__ = ["METHODS", "Standing", "TakeTurn", "Turn"]

METHODS: Mapping[Method, TakeTurn] = {"laasp": laasp.take_turn, "pls": pls.take_turn}
