"""Criteria that look at data: what they are handed of filters' outputs, and what they give back.

Images are looked at in chunks, on one process or many. The chunks are always cut the same way and their states are
merged in their order, so that scores do not depend on who looked at which.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from laasp_ray.errors import ConfigError

Shapes = Mapping[str, tuple[int, int]]
"""Layer -> its filters N and the features W that each has."""
State = TypeVar("State")
METHODS = ("check", "features", "start", "accumulate", "merge", "scores")


@dataclass(frozen=True)
class FirstBatch:
    """What the first batch shows, from which every chunk starts: `means` has each layer's mean features (N, W),
    float64; labels are less than `classes`."""

    means: Mapping[str, torch.Tensor]
    classes: int

    @property
    def shapes(self) -> Shapes:
        return {layer: (mean.shape[0], mean.shape[1]) for layer, mean in self.means.items()}

    def to(self, device: torch.device) -> FirstBatch:
        return FirstBatch({layer: mean.to(device) for layer, mean in self.means.items()}, self.classes)


@runtime_checkable
class DataCriterion(Protocol[State]):
    """A criterion of what filters give on images, all layers at once; of its scores the lowest go first.

    A subclass writes all methods but `check`. Its state is any value that can be pickled; tensors in it may be on any
    device when it is merged. A class is made with those of the options `components` and `pooling` (config/pls.py) that
    its constructor names.
    """

    def check(self, shapes: Shapes, device: torch.device) -> None:
        """Raises ConfigError where so many features cannot be scored on `device`; called before any chunk."""

    @abstractmethod
    def features(self, output: torch.Tensor) -> torch.Tensor:
        """What is kept of a layer's outputs (B, N) or (B, N, places...) for B images: (B, N, W), any W.

        The outputs are those of the layer itself, before its activation function. Features of all layers are held at
        the same time: keep few. A layer that runs several times has the features of all of them side by side.
        """

    @abstractmethod
    def start(self, first: FirstBatch) -> State:
        """The state of no images yet, on the device of `first`."""

    @abstractmethod
    def accumulate(self, state: State, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> State:
        """`state` with a batch: each layer's features (B, N, W), class indices (B,). `state` may be changed."""

    @abstractmethod
    def merge(self, state: State, other: State) -> State:
        """`state` with what `other` has seen. `state` may be changed, `other` may not: its memory is shared."""

    @abstractmethod
    def scores(self, state: State, shapes: Shapes) -> Mapping[str, torch.Tensor]:
        """Each layer's scores (N,) from the state of all images."""


def is_data_criterion(found: object) -> bool:
    """Whether a criterion, as a class or as an object, looks at data."""
    return issubclass(found, DataCriterion) if isinstance(found, type) else isinstance(found, DataCriterion)


def checked(name: str, found: Any) -> Any:
    """`found`, if it is a criterion of either kind; raises ConfigError otherwise."""
    if isinstance(found, type):
        missing = [method for method in METHODS if _is_missing(found, method)]
        if missing:
            raise ConfigError(
                f"criterion {name!r} is a class without {', '.join(missing)}: one that looks at data is a subclass of "
                "laasp_ray.criteria.DataCriterion with all of them, one of weights is a function"
            )
    elif not callable(found) and not isinstance(found, DataCriterion):
        raise ConfigError(f"criterion {name!r} is a {type(found).__name__}, must be a function or a DataCriterion")
    return found


def made(name: str, found: Any, options: Mapping[str, Any]) -> DataCriterion[Any]:
    """The criterion itself: `found`, or an object of that class, made with those of the `options` that it takes."""
    if not isinstance(found, type):
        return found
    try:
        taken = inspect.signature(found).parameters
        return found(**{option: value for option, value in options.items() if option in taken})
    except Exception as error:  # a user's class can fail in any way
        raise ConfigError(
            f"criterion {name!r} cannot be made of the options {', '.join(options)}: {type(error).__name__}: {error}"
        ) from error


def _is_missing(found: type, method: str) -> bool:
    function = getattr(found, method, None)
    return not callable(function) or getattr(function, "__isabstractmethod__", False)
