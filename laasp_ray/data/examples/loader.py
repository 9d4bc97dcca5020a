"""Batches of a data set of the user's own, in the run's order, equal for any number of reading processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from laasp_ray.data.examples.nested import on_device
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.errors import LaaspError


class ExampleLoader:
    """Batches of `examples` on `device`, each a function of (`seed`, epoch, index) alone.

    `workers` processes read them. With 0 they are read where they are used, between two steps and not in a thread: a
    data set may draw from the global random generators, as the network's dropout does.
    """

    name = "the data set itself"

    def __init__(self, examples: Examples, *, device: torch.device, seed: int, workers: int = 0) -> None:
        self._examples, self._device, self._seed, self._workers = examples, device, seed, workers
        self.in_background = workers > 0

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The examples of `batches` (index arrays), in order. Raises DataError, naming the example, for one that cannot
        be read.
        """
        wanted = _Batches(self._examples, self._seed, tuple(batches), epoch)
        for indices, pair in zip(batches, self._loaded(wanted), strict=True):
            if isinstance(pair, LaaspError):
                raise pair
            inputs, targets = on_device(pair, self._device)
            yield Batch(inputs, targets, np.asarray(indices, np.int64))

    def _loaded(self, wanted: _Batches) -> Iterator[Any]:
        if not self._workers:
            return map(wanted.__getitem__, range(len(wanted)))
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        return iter(
            DataLoader(
                wanted,
                batch_size=None,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                pin_memory=self._device.type == "cuda",
                multiprocessing_context=method,
                generator=torch.Generator().manual_seed(0),  # the global one is the dropout's
            )
        )

    def close(self) -> None:
        """There is nothing to free: the processes end with their epoch."""


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """Item n is the batch number n, or the error that it raised."""

    examples: Examples
    seed: int
    batches: tuple[np.ndarray, ...]
    epoch: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.examples.load(self.batches[number].tolist(), self.seed, self.epoch)
        except LaaspError as error:  # as a value, it crosses processes with its own text
            return error


def _as_it_is(value: Any) -> Any:
    return value
