"""The precision of float32 operations: full on every device, where losses are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from laasp_ray.config import Precision


@contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Computes convolutions and matrix products of float32 in this precision, always by the same algorithm. Restores
    the settings.

    GPUs otherwise round to TF32 (10 bits of mantissa). The error is then as large as the difference between candidates,
    even between the masked and the cut form of one prune. With `tf32` they do so here, too; a CPU never does. The
    settings belong to the process, which trainers may share.
    """
    backends: Any = torch.backends
    on_gpu = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    on_cpu = (backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [operation.fp32_precision for operation in (*on_gpu, *on_cpu)]
    algorithms = backends.cudnn.deterministic, backends.cudnn.benchmark
    try:
        for operation in on_gpu:
            operation.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for operation in on_cpu:
            operation.fp32_precision = "ieee"
        backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
        yield
    finally:
        for operation, earlier in zip((*on_gpu, *on_cpu), before, strict=True):
            operation.fp32_precision = earlier
        backends.cudnn.deterministic, backends.cudnn.benchmark = algorithms


full_precision = functools.partial(computing_in, "float32")
"""Float32 means float32."""
