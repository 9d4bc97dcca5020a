"""How much memory the tensors of a forward pass take at a time, found by watching one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `run` take at a time; those that were there before do not count."""
    with _Watch() as watch:
        run()
    return watch.most


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
