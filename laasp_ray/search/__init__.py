"""The search: candidates, their losses, the choice. `rank` does one iteration of it, without a cluster."""

from __future__ import annotations

from laasp_ray.search.ranking import rank

__all__ = ["rank"]
