"""Rules (flow_rules.py) for operations that move, repeat, drop or concatenate elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from laasp_ray.pruning.flow import Call, Follower, tensors_of
from laasp_ray.pruning.labels import Label, along, blocks_of_view, line, moved, pieces, varying

VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"))

_TURNS = frozenset(("permute", "transpose", "t", "unsqueeze", "expand"))


def pointwise(flow: Follower, call: Call) -> None:
    """Combines values at the same position of tensors that are broadcast against each other."""
    written = call.args[0] if call.func._schema.is_mutable and call.args else None
    labels = []
    ndim = max((tensor.ndim for tensor in call.outputs), default=0)
    for tensor in tensors_of((call.args, call.kwargs)):
        labels += [label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape)) for label in flow.get(tensor)]
    if isinstance(written, torch.Tensor) and not flow.get(written) and _is_part(written):
        flow.stick(labels, f"its channels are written into a part of another tensor{flow.where()}")
        return
    merged = flow.flow.channels.merged(labels)
    for tensor in call.outputs:
        if tensor.ndim == ndim:
            flow.set(tensor, merged)


def _is_part(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def move(flow: Follower, call: Call) -> None:
    """Moves, drops or repeats elements."""
    source = call.args[0]
    shape = call.shapes[id(source)]
    if call.name == "as_strided" and tuple(call.out.shape) == shape:  # only the order in memory changes
        pointwise(flow, call)
        return
    if call.name in _TURNS:
        flow.set(call.out, [_turned(flow, call, label) for label in flow.get(source)])
        return
    for label in flow.get(source):
        if not _movable(flow, call, label, shape):
            flow.stick([label], f"its channels pass through {article(call)}{flow.where()}, {_fixed(call)}")
            continue

        def move(numbers: torch.Tensor) -> object:
            if call.name in VIEWS:
                return numbers.reshape(call.out.shape)
            return call.func(numbers, *call.args[1:], **call.kwargs)

        for tensor, found in zip(call.outputs, moved(label, shape, move), strict=True):
            if bool(found.any()):
                _note_blocks(flow, call, label, found)
                flow.set(tensor, [*flow.get(tensor), found])


def _fixed(call: Call) -> str:
    if call.name in ("slice", "split", "split_with_sizes", "unsafe_split", "select", "unbind"):
        return "whose sizes the network's code fixes"
    return "which moves or picks them by fixed places"


def _turned(flow: Follower, call: Call, label: Label) -> Label:
    """The label after an operation that changes only the order or number of dimensions, computed without looking at
    elements.

    If the dimensions of a line in blocks change places, the blocks are interleaved. Channels at the same position of
    all blocks are then tied; otherwise the remaining channels would meet other ones than before.
    """
    if call.name == "expand":
        return label.reshape((1,) * (call.out.ndim - label.ndim) + tuple(label.shape))
    turned = call.func(label, *call.args[1:], **call.kwargs).clone()
    dims = varying(label)
    if len(dims) > 1 and not torch.equal(turned.reshape(-1), label.reshape(-1)):
        tied = flow.flow.channels.tie_along(label, dims[:-1])
        return call.func(tied, *call.args[1:], **call.kwargs).clone()
    return turned


def article(call: Call) -> str:
    name = {"split_with_sizes": "split"}.get(call.name, call.name.strip("_"))
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _movable(flow: Follower, call: Call, label: Label, shape: Sequence[int]) -> bool:
    """Whether the operation moves a pruned tensor's elements as it moves those of the whole. Records blocks that it
    needs.
    """
    dims, name = varying(label), call.name
    if name in ("roll", "index", "index_select", "gather", "as_strided", "diagonal"):
        return not set(_dims_touched(call, len(shape))) & set(dims)
    if name == "unfold":
        return call.args[1] % len(shape) not in dims
    if name == "constant_pad_nd":
        pads = list(call.args[1])
        cropped = {len(shape) - 1 - place // 2 for place, amount in enumerate(pads) if amount < 0}
        return not cropped & set(dims)
    if name in ("slice", "split", "split_with_sizes", "unbind", "select", "unsafe_split"):
        dim = call.argument("dim", 0) % len(shape)
        if dim not in dims:
            return True
        if len(dims) > 1:  # a view cut the line into blocks and recorded that; whole blocks may be selected
            return dim != dims[-1]
        return _cut_line(flow, call, label, dim)
    return True


def _cut_line(flow: Follower, call: Call, label: Label, dim: int) -> bool:
    outputs = call.outputs
    if call.name in ("select", "unbind"):
        return False
    size = label.shape[dim]
    sizes = [tensor.shape[dim] for tensor in outputs]
    if call.name == "slice":
        if call.argument("step", 1) != 1:
            return False
        start = call.argument("start") or 0
        start = max(0, start + size) if start < 0 else start
        if sizes[0] == size:
            return True
        if not sizes[0] or size % sizes[0] or start % sizes[0]:
            return False
        count: int | None = size // sizes[0]
    else:
        count = pieces(sizes)
    if count is None:
        return False
    if count > 1:
        flow.flow.blocks.append((line(label), count, f"{article(call)}{flow.where()}"))
    return True


def _dims_touched(call: Call, ndim: int) -> list[int]:
    if call.name == "roll":
        dims = call.argument("dims") or range(ndim)
    elif call.name == "index":
        dims = [dim for dim, index in enumerate(call.args[1]) if index is not None]
    elif call.name in ("index_select", "gather"):
        dims = [call.args[1]]
    else:
        dims = range(ndim)
    return [dim % ndim for dim in dims]


def _note_blocks(flow: Follower, call: Call, before: Label, after: Label) -> None:
    if call.name in VIEWS or call.name in ("pixel_shuffle", "pixel_unshuffle"):
        count = blocks_of_view(before, after)
        if count is None:
            flow.stick([before], f"its channels are cut twice by a change of shape{flow.where()}")
        elif count > 1:
            flow.flow.blocks.append((line(before), count, f"a change of shape{flow.where()}"))
    elif call.name in ("channel_shuffle", "native_channel_shuffle") and 1 in varying(before):
        groups = int(call.args[1])
        flow.flow.channels.tie_along(torch.from_numpy(line(before)).reshape(groups, -1), [0])


def concatenate(flow: Follower, call: Call) -> None:
    """Concatenates tensors along `dim`. Along all other dimensions their channels are tied."""
    parts = list(call.args[0])
    if call.name == "stack":
        dim = call.argument("dim", 0) % call.out.ndim
        given = [[label.unsqueeze(dim) for label in flow.get(part)] for part in parts]
        sizes = [1] * len(parts)
    else:
        parts = [part for part in parts if part.ndim == call.out.ndim]
        dim = call.argument("dim", 0) % call.out.ndim
        given = [flow.get(part) for part in parts]
        sizes = [part.shape[dim] for part in parts]
    channels = flow.flow.channels
    labels: list[Label] = []
    # First `dim` itself, then each set of other dimensions.
    pieces_along = []
    others: list[Label] = []
    for found, size in zip(given, sizes, strict=True):
        own = [label for label in found if varying(label) == (dim,) or (size == 1 and not varying(label))]
        pieces_along.append(line(own[0]) if own else np.zeros(size, np.int64))
        others += [label for label in found if varying(label) and varying(label) != (dim,)]
    joined = np.concatenate(
        [part if len(part) == size else np.full(size, part[0]) for part, size in zip(pieces_along, sizes, strict=True)]
    )
    if joined.any() and call.name == "cat":
        labels.append(along(joined, dim, call.out.ndim))
    mixed = [label for label in others if dim in varying(label)]
    if mixed:
        flow.stick(mixed, f"its channels are joined across blocks{flow.where()}")
    labels += channels.merged([label for label in others if dim not in varying(label)])
    flow.set(call.out, labels)
