"""A run's settings, as frozen dataclasses: one file a section. Whoever uses them imports them from here."""

from __future__ import annotations

from laasp_ray.config.run import *  # noqa: F403
