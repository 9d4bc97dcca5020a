"""What a run's iterations leave to the next ones, so that it is not computed again."""

from __future__ import annotations

from dataclasses import dataclass, field

from laasp_ray.pruning.following import GraphMemory
from laasp_ray.search.compensating import CompensationMemory
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.scoring import ScoreMemory


@dataclass(frozen=True)
class IterationMemory:
    """The last graph, the scores of layers that have not changed since, moments, and losses. A run has one."""

    graphs: GraphMemory = field(default_factory=GraphMemory)
    scores: ScoreMemory = field(default_factory=ScoreMemory)
    compensation: CompensationMemory = field(default_factory=CompensationMemory)
    race: RaceMemory = field(default_factory=RaceMemory)
