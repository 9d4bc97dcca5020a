"""Full float32 precision on every device, where losses are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes convolutions and matrix products of float32 in float32, always by the same algorithm. Restores the
    settings.

    GPUs otherwise round to TF32 (10 bits of mantissa). The error is then as large as the difference between candidates,
    even between the masked and the cut form of one prune. The settings belong to the process, which trainers may share.
    """
    backends: Any = torch.backends
    rounded = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    before = [operation.fp32_precision for operation in rounded]
    algorithms = backends.cudnn.deterministic, backends.cudnn.benchmark
    try:
        for operation in rounded:
            operation.fp32_precision = "ieee"
        backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
        yield
    finally:
        for operation, precision in zip(rounded, before, strict=True):
            operation.fp32_precision = precision
        backends.cudnn.deterministic, backends.cudnn.benchmark = algorithms
