"""The importance of filters on a cluster: chunks of images as Ray tasks, their moments added up in the driver.

The chunks are those of the serial procedure (search/activations.py) and are added in the same order, so that the
number of workers does not change a bit of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import ray
import torch

from laasp_ray.criteria.pls import Moments
from laasp_ray.distributed.process import PROCESS, device
from laasp_ray.distributed.tasks import answer
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.search.activations import FirstBatch, ImportanceRequest, measure_first_batch, moments_of, scores_of

AHEAD = 2
"""How many chunks for each slot are asked for before the first of them is added: each may be hundreds of megabytes."""


def spread(
    inputs: list[Any], wanted: ImportanceRequest, chunks: Sequence[np.ndarray], slots: int, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """VIP (N,) of every wanted layer's filters; `inputs` are references to the unpruned network, the iteration's (plan
    and tensors) and the calibration set. Raises what `search.activations.importance` does, SearchError if tasks are
    lost."""
    look: FirstBatch = _answer(ray.remote(first_batch_task).options(**options).remote(inputs, wanted))
    shared = ray.put(look)
    task = ray.remote(moments_task).options(**options)

    def parts() -> Iterator[Moments]:
        pending: list[Any] = []
        todo = iter(chunks)
        try:
            while True:
                pending += [
                    task.remote(inputs, wanted, [shared], chunk)
                    for _, chunk in zip(range(AHEAD * slots - len(pending)), todo, strict=False)
                ]
                if not pending:
                    return
                yield Moments(**unpack(_answer(pending.pop(0)), copy=False))
        finally:
            for reference in pending:
                ray.cancel(reference, force=False)

    return scores_of(parts(), look, wanted.components)


def first_batch_task(inputs: list[Any], wanted: ImportanceRequest) -> FirstBatch:
    """The task that looks at the first batch; references inside the list `inputs` are kept by the process."""
    model, calibration = PROCESS.network(*inputs)
    look = measure_first_batch(model, calibration, wanted)
    return FirstBatch(look.pilot.cpu(), look.shapes, look.classes)


def moments_task(
    inputs: list[Any], wanted: ImportanceRequest, look: list[Any], chunk: np.ndarray
) -> dict[str, np.ndarray]:
    """The task that measures the moments of the images at `chunk`."""
    model, calibration = PROCESS.network(*inputs)
    moments = moments_of(model, calibration, wanted, ray.get(look[0]), chunk)
    arrays = pack({field.name: getattr(moments, field.name) for field in fields(moments)})
    if device().type == "cuda":
        del moments
        torch.cuda.empty_cache()  # the trainers share this GPU
    return arrays


def _answer(reference: Any) -> Any:
    return answer(
        reference,
        "a task that looks at filters' outputs",
        "lower search.batch_size or pool in larger windows (prune.pooling)",
    )
