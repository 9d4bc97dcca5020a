"""A data set of the user's own: what makes it, and its examples as functions of (seed, epoch, index)."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from laasp_ray.data.examples.nested import digest_of
from laasp_ray.data.ordering import derive_seed
from laasp_ray.data.sources.base import Split
from laasp_ray.errors import ConfigError, DataError, LaaspError

_SAMPLE = 16
"""The number of examples whose content is part of a data set's identity."""
_DRAWS = 2**32
"""numpy's generator takes seeds below this."""


@dataclass(frozen=True)
class OwnData:
    """A map-style data set of the user's own, and how its examples become a batch.

    `factory` is called with the split, "train" or "test", and `arguments`. It returns an object with `__len__` and
    `__getitem__`, such as a `torch.utils.data.Dataset`. It runs in every process that reads data, so it must be
    picklable and give the same examples everywhere. `collate` makes of a list of examples a batch, the pair (inputs,
    targets); None: torch's `default_collate`. The order of the examples is the run's; see `Examples.example` for random
    augmentation.
    """

    factory: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    _opened: dict[Split, Examples] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnData, (self.factory, self.arguments, self.collate)  # a worker opens the data itself

    def open(self, split: Split) -> Examples:
        """The examples of a split; opened once in a process.

        Raises ConfigError if the factory fails or gives no map-style data set, DataError if that is empty.
        """
        if split not in self._opened:
            self._opened[split] = self._open(split)
        return self._opened[split]

    def collated(self, examples: Sequence[Any], indices: Sequence[int]) -> tuple[Any, Any]:
        """The batch of training examples that were read before; opens no data. See `Examples.batch`."""
        return Examples((), "train", self.collate or default_collate).batch(examples, indices)

    def _open(self, split: Split) -> Examples:
        what = f"the data factory {_name_of(self.factory)}"
        try:
            dataset = self.factory(split, **self.arguments)
        except (LaaspError, OSError):
            raise
        except Exception as error:  # a user's code can raise any error
            raise ConfigError(f"{what} failed for the {split} data: {type(error).__name__}: {error}") from error
        missing = [name for name in ("__len__", "__getitem__") if not callable(getattr(dataset, name, None))]
        if missing:
            raise ConfigError(
                f"{what} gave a {type(dataset).__name__} for the {split} data, which has no {' and no '.join(missing)}:"
                " it must give a map-style data set, such as a torch.utils.data.Dataset with both"
            )
        if len(dataset) < 1:
            raise DataError(f"{what} gave no {split} examples: its data set has length 0")
        return Examples(dataset, split, self.collate or default_collate)


@dataclass(frozen=True)
class Examples:
    """The examples of one split."""

    dataset: Any
    split: Split
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, seed: int, epoch: int) -> Any:
        """`dataset[index]`, read while the generators of `random`, numpy and torch are seeded by (seed, epoch, index).

        So random augmentation in the data set is the same in every process and after a restart. The generators are left
        as they were. Raises DataError, naming the example, if the data set fails.
        """
        with _seeded(derive_seed(seed, f"example/{self.split}/{epoch}/{index}")):
            try:
                return self.dataset[int(index)]
            except LaaspError:
                raise
            except Exception as error:  # a user's code can raise any error
                raise DataError(
                    f"example {index} of the {self.split} data cannot be read ({type(error).__name__}: {error}): repair"
                    " it, or leave it out of the data set"
                ) from error

    def batch(self, examples: Sequence[Any], indices: Sequence[int]) -> tuple[Any, Any]:
        """The pair (inputs, targets) that `collate` makes of the examples, which are those at `indices`.

        Raises DataError if it fails or gives anything else.
        """
        where = f"the {self.split} examples {_shown(indices)}"
        try:
            made = self.collate(list(examples))
        except Exception as error:
            raise DataError(
                f"{where} cannot be collated ({type(error).__name__}: {error}): give all examples the same shapes, or "
                "give a collate function of your own, which makes of a list of examples a pair (inputs, targets)"
            ) from error
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            parts = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
            raise DataError(
                f"{where} are collated to a {type(made).__name__}{parts}, must be a pair (inputs, targets): have the "
                "data set give (input, target), or give a collate function of your own"
            )
        inputs, targets = made
        _check_inputs(inputs, len(examples), where)
        return inputs, targets

    def load(self, indices: Sequence[int], seed: int, epoch: int) -> tuple[Any, Any]:
        """The batch of the examples at `indices`."""
        return self.batch([self.example(index, seed, epoch) for index in indices], indices)

    def identity(self) -> dict[str, Any]:
        """The number of examples, and a digest over it and the content of some of them, which are read once."""
        return dict(self._identity)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        count = len(self)
        chosen = range(0, count, -(-count // _SAMPLE))
        return {"images": count, "digest": digest_of([count, *(self.example(index, 0, 0) for index in chosen)])}


def _check_inputs(inputs: Any, examples: int, where: str) -> None:
    """Raises DataError unless `inputs` are a tensor with a row, or a list with an item, for each of the `examples`."""
    rule = "one tensor with a row for each example or, for a loss of (model, batch), a list with an item for each"
    if not isinstance(inputs, (torch.Tensor, list, tuple)):
        raise DataError(
            f"{where} are collated to inputs that are a {type(inputs).__name__}, must be {rule}: give a list of "
            "what the loss takes of each example, and put them together in the loss"
        )
    count = len(inputs) if not isinstance(inputs, torch.Tensor) or inputs.ndim else 0
    if count != examples:
        kind = "tensor" if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise DataError(f"{where} are collated to {count} inputs (a {kind}), must be {examples}: {rule}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % _DRAWS)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _name_of(factory: Any) -> str:
    return str(getattr(factory, "__qualname__", type(factory).__name__))


def _shown(indices: Sequence[int]) -> str:
    return ", ".join(str(int(index)) for index in indices[:4]) + (", ..." if len(indices) > 4 else "")


def check_example_identity(known: Mapping[str, Any], examples: Examples) -> None:
    """Raises DataError if `examples` are not those of the identity `known`, with which the run began."""
    found = examples.identity()
    if found != {key: known.get(key) for key in found}:
        raise DataError(
            f"the {examples.split} data are not those that the run began with ({found['images']} examples now, "
            f"{known.get('images')} at its start, or others): restore them, have the factory give the same examples "
            "every time, or start a new run with another --name"
        )
