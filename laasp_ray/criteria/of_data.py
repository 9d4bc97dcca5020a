"""Criteria of data: the interface through which they receive filters' outputs and return scores.

Images are processed in chunks, on one process or many. The chunks are always the same and their states are merged in
the same order, so the scores do not depend on which process had which chunk.
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
"""Layer -> (number of filters N, number of features W of each filter)."""
State = TypeVar("State")
METHODS = ("check", "features", "start", "accumulate", "merge", "scores")


@dataclass(frozen=True)
class FirstBatch:
    """Facts from the first batch, which every chunk starts from. `means` has each layer's mean features (N, W),
    float64. Labels are less than `classes`; with
    `responses` there are numbers (n, `classes`) for each batch in place of labels.
    """

    means: Mapping[str, torch.Tensor]
    classes: int
    responses: bool = False

    @property
    def shapes(self) -> Shapes:
        return {layer: (mean.shape[0], mean.shape[1]) for layer, mean in self.means.items()}

    def to(self, device: torch.device) -> FirstBatch:
        means = {layer: mean.to(device) for layer, mean in self.means.items()}
        return FirstBatch(means, self.classes, self.responses)


@runtime_checkable
class DataCriterion(Protocol[State]):
    """A criterion that scores the outputs of filters on images, for all layers at once. The lowest scores are pruned
    first.

    A subclass defines all methods except `check`. Its state is any value that can be pickled. Tensors in the state may
    be on any device when it is merged. The constructor may take the options `components` and `pooling` (config/pls.py);
    it receives those that it names. With a class attribute `takes_responses = True` it is used for a task of the user's
    own without class labels, too: `accumulate` gets that one's responses (B, d), floats, as labels.
    """

    def check(self, shapes: Shapes, device: torch.device) -> None:
        """Raises ConfigError if features of these `shapes` cannot be scored on `device`. Called before any chunk."""

    @abstractmethod
    def features(self, output: torch.Tensor) -> torch.Tensor:
        """Reduces a layer's outputs (B, N) or (B, N, places...) for B images to features (B, N, W), for any W.

        The outputs are those of the layer itself, before its activation function. Features of all layers are in memory
        at the same time, so W should be small. If a layer runs several times, the features of all its calls are
        concatenated.
        """

    @abstractmethod
    def start(self, first: FirstBatch) -> State:
        """The state before any images, on the device of `first`."""

    @abstractmethod
    def accumulate(self, state: State, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> State:
        """Adds a batch to `state`: each layer's features (B, N, W), class indices (B,). May change `state`."""

    @abstractmethod
    def merge(self, state: State, other: State) -> State:
        """Adds the images of `other` to `state`. May change `state`, but not `other`, whose memory is shared."""

    @abstractmethod
    def scores(self, state: State, shapes: Shapes) -> Mapping[str, torch.Tensor]:
        """Each layer's scores (N,), from the state of all images."""


def is_data_criterion(found: object) -> bool:
    """Whether a criterion, given as a class or as an object, is one of data."""
    return issubclass(found, DataCriterion) if isinstance(found, type) else isinstance(found, DataCriterion)


def checked(name: str, found: Any) -> Any:
    """`found`, if it is a criterion of either kind; else raises ConfigError."""
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
    """The criterion object: `found` itself, or an object of the class `found`, made with those of the `options` that it
    takes.
    """
    if not isinstance(found, type):
        return found
    try:
        taken = inspect.signature(found).parameters
        return found(**{option: value for option, value in options.items() if option in taken})
    except Exception as error:  # a user's class can raise any error
        raise ConfigError(
            f"criterion {name!r} cannot be made of the options {', '.join(options)}: {type(error).__name__}: {error}"
        ) from error


def _is_missing(found: type, method: str) -> bool:
    function = getattr(found, method, None)
    return not callable(function) or getattr(function, "__isabstractmethod__", False)
