"""The search: candidates, their losses and the choice. `rank` carries out one iteration of it without a cluster."""

from __future__ import annotations

from laasp_ray.search.ranking import rank

__all__ = ["rank"]
