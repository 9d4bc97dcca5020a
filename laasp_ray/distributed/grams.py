"""Sums of products of layers' inputs, on a cluster. Chunks of images are calls of the workers; the driver adds them.

The chunks are those of the serial procedure (search/grams.py), and they are added in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from laasp_ray.distributed.process import PROCESS
from laasp_ray.distributed.search_workers import Job, SearchWorkers
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.pruning.moments import Gram
from laasp_ray.pruning.readers import Reader
from laasp_ray.search.grams import added, grams_of

REMEDY = "lower search.batch_size or search.memory_mb"


def spread_grams(
    workers: SearchWorkers, inputs: list[Any], parts: Iterable[Sequence[Reader]], chunks: Sequence[np.ndarray]
) -> dict[str, Gram]:
    """The sums of all readers. `inputs` are references to the unpruned network, the iteration's and the images."""
    found: dict[str, Gram] = {}
    for readers in parts:
        arguments = ([inputs, tuple(readers), chunk] for chunk in chunks)
        jobs = (Job(grams_task, some, "a look at layers' inputs", REMEDY) for some in arguments)
        sums = workers.in_order(jobs, workers.slots)  # no more at a time: each chunk's sums may be gigabytes
        found |= added({layer: Gram(total) for layer, total in unpack(arrays, copy=False).items()} for arrays in sums)
    return found


def grams_task(inputs: list[Any], readers: Sequence[Reader], chunk: np.ndarray) -> dict[str, np.ndarray]:
    """What a worker is asked: the sums over the images at `chunk`."""
    model, calibration = PROCESS.network(*inputs)
    return pack({layer: gram.total for layer, gram in grams_of(model, calibration, readers, chunk).items()})
