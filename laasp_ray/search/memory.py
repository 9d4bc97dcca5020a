"""How much memory the tensors of a forward pass take at a time, found by watching one; and what is done without it.

That memory ran out says something of the device and of who shares it, never of a candidate.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from laasp_ray.errors import MemoryShortError, describe_error, is_out_of_memory

ATTEMPTS = 3
"""How often what does not fit into memory, and cannot be made smaller, is tried: others may let go of theirs."""
REMEDY = "lower search.memory_mb or search.batch_size"


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `run` take at a time; those that were there before do not count."""
    with _Watch() as watch:
        run()
    return watch.most


def let_go() -> None:
    """Gives back what is held but not used. The error whose frames hold tensors must be gone by then."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_parts(total: int, size: int, run: Callable[[int, int, float], None]) -> None:
    """`run(start, stop, share)` for parts of `size` of 0..total; smaller ones from where memory ran out.

    `share` is how much of what goes together otherwise may: 1 until memory runs out, then ever less.
    Raises MemoryShortError where it runs out for a single one, several times.
    """
    start, share, short = 0, 1.0, 0
    while start < total:
        stop = min(total, start + size)
        shortage = _attempt(functools.partial(run, start, stop, share))
        if not shortage:
            start, short = stop, 0
            continue
        let_go()
        short += stop - start == 1
        if short == ATTEMPTS:
            raise MemoryShortError(f"memory runs out for a single image ({shortage}): {REMEDY}, or free some of it")
        size = max(1, (stop - start) // 2)
        share = 0.0 if stop - start == 1 else share / 2


def retried(run: Callable[[], Any], what: str, remedy: str = REMEDY) -> Any:
    """What `run` gives, tried again where memory runs out; MemoryShortError, naming `what`, if it always does."""
    given: list[Any] = []
    for _ in range(ATTEMPTS):
        shortage = _attempt(lambda: given.append(run()))
        if not shortage:
            return given[0]
        let_go()
    raise MemoryShortError(f"{what} does not fit into memory ({shortage}): {remedy}, or free some of it")


def _attempt(run: Callable[[], Any]) -> str:
    """What the allocator said, if memory ran out. Nothing of the error is kept, whose frames hold tensors."""
    try:
        run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return describe_error(error)
    return ""


class _Watch(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._live: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((arguments, keywords))}
        result = function(*arguments, **(keywords or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._live:  # neither a view nor changed in place
                self._live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _forget(self, storage: int, size: int) -> None:
        self._live.discard(storage)
        self.now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in _pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]
