"""Scores of filters by a criterion of data, on a cluster. Chunks of images are Ray tasks; the driver merges their
states.

The chunks are those of the serial procedure (search/activations.py), and they are merged in the same order. So the
scores are equal to the last bit for any number of workers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle

from laasp_ray.criteria import FirstBatch
from laasp_ray.distributed.process import PROCESS
from laasp_ray.distributed.search_workers import Job, SearchWorkers
from laasp_ray.distributed.transfer import pack_object, unpack_object
from laasp_ray.errors import ConfigError
from laasp_ray.search.activations import ImportanceRequest, measure_first_batch, scores_of, state_of

AHEAD = 2
"""The number of chunks per slot that are requested before the first is merged. A state may be hundreds of megabytes."""


def spread(
    workers: SearchWorkers, inputs: list[Any], wanted: ImportanceRequest, chunks: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """Scores (N,) of every wanted layer's filters.

    `inputs` are references to the unpruned network, the iteration's (plan and tensors) and the calibration set. Raises
    what `search.activations.importance` does, SearchError if a chunk's workers are lost.
    """
    request = (wanted.name, cloudpickle.dumps(wanted))
    first: FirstBatch = workers.call(_job(first_batch_task, inputs, request))
    shared = ray.put(first)
    jobs = (_job(chunk_task, inputs, request, [shared], chunk) for chunk in chunks)
    states = workers.in_order(jobs, AHEAD * workers.slots)
    return scores_of(map(unpack_object, states), first, wanted)


def _job(function: Callable[..., Any], *arguments: Any) -> Job:
    remedy = "lower search.batch_size or pool in larger windows (prune.pooling)"
    return Job(function, arguments, "a look at filters' outputs", remedy)


def first_batch_task(inputs: list[Any], request: tuple[str, bytes]) -> FirstBatch:
    """The Ray task that processes the first batch. The process keeps the values of references in the list `inputs`."""
    wanted = _unpacked(*request)
    model, calibration = PROCESS.network(*inputs)
    return measure_first_batch(model, calibration, wanted).to(torch.device("cpu"))


def chunk_task(inputs: list[Any], request: tuple[str, bytes], first: list[Any], chunk: np.ndarray) -> list[np.ndarray]:
    """The Ray task that returns the criterion's packed state after the images at `chunk`."""
    wanted = _unpacked(*request)
    model, calibration = PROCESS.network(*inputs)
    state = state_of(model, calibration, wanted, ray.get(first[0]), chunk)
    try:
        arrays = pack_object(state)
    except Exception as error:  # a user's state may have any type
        raise ConfigError(
            f"criterion {wanted.name!r} has a state that cannot be pickled: {type(error).__name__}: {error}"
        ) from error
    return arrays


def _unpacked(name: str, request: bytes) -> ImportanceRequest:
    """The unpickled request. Raises ConfigError if this process cannot import the criterion `name`."""
    try:
        return pickle.loads(request)
    except Exception as error:
        raise ConfigError(
            f"a worker cannot load criterion {name!r}: {type(error).__name__}: {error}; workers must be able to import "
            "its module: install it on every node, or submit the job with a --working-dir that has it"
        ) from error
