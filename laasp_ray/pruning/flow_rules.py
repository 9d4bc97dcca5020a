"""What each operation does to the channels of its tensors (flow.py). Operations go by their names in PyTorch's ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from laasp_ray.pruning.flow import Call, Follower, Meeting, tensors_of
from laasp_ray.pruning.labels import Label, along, blocks_of_view, line, moved, pieces, varying

Rule = Callable[[Follower, Call], None]


def follow(flow: Follower, call: Call) -> None:
    """Labels what an operation gave, and notes what it asks of the channels that it read."""
    name = call.name
    if name in _FRESH:
        return
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in call.func.tags:
        rule = _pointwise
    if rule is None:
        _unknown(flow, call)
    else:
        rule(flow, call)


def _unknown(flow: Follower, call: Call) -> None:
    labels = [label for tensor in tensors_of((call.args, call.kwargs)) for label in flow.get(tensor)]
    flow.stick(labels, f"its channels pass through {_spoken(call)}{flow.where()}, which is not followed")


def _spoken(call: Call) -> str:
    return call.name.strip("_")


def _pointwise(flow: Follower, call: Call) -> None:
    """Values at the same place of tensors, broadcast against each other."""
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


def _move(flow: Follower, call: Call) -> None:
    """Elements change their places, or are left out or repeated."""
    source = call.args[0]
    shape = call.shapes[id(source)]
    if call.name == "as_strided" and tuple(call.out.shape) == shape:  # only the order in memory changes
        _pointwise(flow, call)
        return
    if call.name in _TURNS:
        flow.set(call.out, [_turned(flow, call, label) for label in flow.get(source)])
        return
    for label in flow.get(source):
        if not _movable(flow, call, label, shape):
            flow.stick([label], f"its channels pass through {_article(call)}{flow.where()}, which moves or picks them")
            continue

        def move(numbers: torch.Tensor) -> object:
            if call.name in _VIEWS:
                return numbers.reshape(call.out.shape)
            return call.func(numbers, *call.args[1:], **call.kwargs)

        for tensor, found in zip(call.outputs, moved(label, shape, move), strict=True):
            if found is not None:
                _note_blocks(flow, call, label, found)
                flow.set(tensor, [*flow.get(tensor), found])


def _turned(flow: Follower, call: Call, label: Label) -> Label:
    """The label after a change of the order or number of dimensions, which needs no elements to be looked at.

    Blocks of channels whose dimensions change places are interleaved: then what lies at the same place of all blocks
    must go together, or those that are left would meet others than before.
    """
    if call.name == "expand":
        return label.reshape((1,) * (call.out.ndim - label.ndim) + tuple(label.shape))
    turned = call.func(label, *call.args[1:], **call.kwargs).clone()
    dims = varying(label)
    if len(dims) > 1 and not torch.equal(turned.reshape(-1), label.reshape(-1)):
        tied = flow.flow.channels.tie_along(label, dims[:-1])
        return call.func(tied, *call.args[1:], **call.kwargs).clone()
    return turned


def _article(call: Call) -> str:
    name = {"split_with_sizes": "split"}.get(call.name, _spoken(call))
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _movable(flow: Follower, call: Call, label: Label, shape: Sequence[int]) -> bool:
    """Whether moving a pruned tensor moves what is left as it moves the whole; notes blocks where it must be cut so."""
    dims, name = varying(label), call.name
    if name in ("roll", "index", "index_select", "gather", "as_strided", "diagonal"):
        return not set(_dims_touched(call, len(shape))) & set(dims)
    if name in ("slice", "split", "split_with_sizes", "unbind", "select", "unsafe_split"):
        dim = call.argument("dim", 0) % len(shape)
        if dim not in dims:
            return True
        if len(dims) > 1:  # a view cut the line into blocks, and said so; whole blocks may be picked
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
        flow.flow.blocks.append((line(label), count, f"{_article(call)}{flow.where()}"))
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
    if call.name in _VIEWS or call.name in ("pixel_shuffle", "pixel_unshuffle"):
        count = blocks_of_view(before, after)
        if count is None:
            flow.stick([before], f"its channels are cut twice by a change of shape{flow.where()}")
        elif count > 1:
            flow.flow.blocks.append((line(before), count, f"a change of shape{flow.where()}"))
    elif call.name in ("channel_shuffle", "native_channel_shuffle") and 1 in varying(before):
        groups = int(call.args[1])
        flow.flow.channels.tie_along(torch.from_numpy(line(before)).reshape(groups, -1), [0])


def _concatenate(flow: Follower, call: Call) -> None:
    """Tensors side by side along `dim`; along all others their channels are the same."""
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
    # Along `dim` itself, and then each set of other dimensions.
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


def _reduce(flow: Follower, call: Call) -> None:
    """A statistic over some dimensions: sums, means, maxima, norms."""
    source = call.args[0]
    ndim = len(call.shapes[id(source)])
    given = call.argument("dim")
    dims = [given] if isinstance(given, int) else list(given) if given else list(range(ndim))
    gone = {dim % max(1, ndim) for dim in dims}
    keep = bool(call.argument("keepdim", False))
    held, left = [], []
    for label in flow.get(source):
        shared = set(varying(label)) & gone
        if shared == set(varying(label)):
            held.append(label)
            continue
        label = flow.flow.channels.tie_along(label, shared)
        shape = [size for dim, size in enumerate(label.shape) if keep or dim not in gone]
        left.append(label.reshape(shape))
    for tensor in call.outputs:
        flow.set(tensor, left)
    if held:
        _hold(flow, call, held)


def _hold(flow: Follower, call: Call, labels: Sequence[Label]) -> None:
    kept = tuple(tuple(flow.get(tensor)) for tensor in call.outputs)
    channels = np.unique(np.concatenate([label.numpy().reshape(-1) for label in labels]))
    flow.flow.meetings.append(Meeting("holds", flow.calls[call.name] - 1, flow.module, channels, call.name, kept=kept))


def _softmax(flow: Follower, call: Call) -> None:
    source = call.args[0]
    dim = call.args[1] % source.ndim
    held = [label for label in flow.get(source) if dim in varying(label)]
    mixed = [label for label in held if len(varying(label)) > 1]
    flow.stick(mixed, f"its channels are cut into blocks before a softmax{flow.where()}")
    flow.set(call.out, flow.get(source))
    if held:
        _hold(flow, call, held)


def _spatial(flow: Follower, call: Call) -> None:
    """Pooling and resizing: batch and channels stay, places change."""
    source = call.args[0]
    digits = [int(letter) for letter in call.name if letter.isdigit()]
    places = digits[-1] if digits else source.ndim - 2
    if "linear" in call.name or "cubic" in call.name or "nearest" in call.name:
        places = source.ndim - 2
    fixed = range(source.ndim - places)
    passing = [label for label in flow.get(source) if set(varying(label)) <= set(fixed)]
    others = [label for label in flow.get(source) if not set(varying(label)) <= set(fixed)]
    flow.stick(others, f"its channels lie along a dimension that {_article(call)} resizes{flow.where()}")
    for tensor in call.outputs:
        flow.set(tensor, passing)


def _matmul(flow: Follower, call: Call) -> None:
    """(..., n, k) x (..., k, m), with or without something added."""
    first, second = call.args[-2:] if call.name in ("addmm", "baddbmm", "addmv", "addbmm") else call.args[:2]
    ranks = first.ndim, second.ndim
    summed = ranks[0] - 1, max(0, ranks[1] - 2)
    lines = [_read_along(flow, tensor, dim) for tensor, dim in zip((first, second), summed, strict=True)]
    if lines[0] is not None and lines[1] is not None:
        flow.flow.channels.tie_lines(lines[0], lines[1])
    channels = lines[0] if lines[0] is not None else lines[1]
    if channels is not None:
        position = next(
            index for index, value in enumerate(call.args) if value is (first if lines[0] is not None else second)
        )
        dim = summed[0] if lines[0] is not None else summed[1]
        flow.flow.meetings.append(
            Meeting(
                "reads",
                flow.calls[call.name] - 1,
                flow.module,
                channels,
                call.name,
                position,
                dim,
                owner=flow.flow.owner(lines[1]),
            )
        )
    ndim = call.out.ndim
    labels = [
        _without(label, summed[0], ndim, front=True) for label in flow.get(first) if summed[0] not in varying(label)
    ]
    labels += [
        _without(label, summed[1], ndim, front=False) for label in flow.get(second) if summed[1] not in varying(label)
    ]
    if len(call.args) > 2 and call.name.startswith("add") or call.name == "baddbmm":
        labels += [label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape)) for label in flow.get(call.args[0])]
    flow.set(call.out, flow.flow.channels.merged(labels))


def _without(label: Label, dim: int, ndim: int, *, front: bool) -> Label:
    """The label of a factor in the product: its own dimension of rows or columns, and those of the batch."""
    rest = label.squeeze(dim)
    batch, own = (rest.shape[:-1], rest.shape[-1:]) if rest.ndim else ((), ())
    if not own:
        return label.reshape((1,) * ndim)
    shape = (*batch, *own, 1) if front else (*batch, 1, *own)
    if len(shape) > ndim:  # a vector has no rows or columns
        shape = (*batch, *own)
    return rest.reshape((1,) * (ndim - len(shape)) + tuple(shape))


def _read_along(flow: Follower, tensor: torch.Tensor, dim: int) -> np.ndarray | None:
    """The line of channels along `dim`; what lies across it, too, goes together."""
    found = None
    for label in flow.get(tensor):
        if dim in varying(label):
            label = flow.flow.channels.tie_along(label, [other for other in varying(label) if other != dim])
            found = line(label)
    return found


def _convolution(flow: Follower, call: Call) -> None:
    inputs, weight, bias = call.args[:3]
    transposed, groups = bool(call.argument("transposed", False)), int(call.argument("groups", 1))
    channels = flow.flow.channels
    batched = inputs.ndim == weight.ndim
    dim = 1 if batched else 0
    read = _read_along(flow, inputs, dim)
    others = [label for label in flow.get(inputs) if dim not in varying(label)]
    flow.stick(others, f"its channels do not lie along the channels of a convolution{flow.where()}")
    axis_in, axis_out = (0, 1) if transposed else (1, 0)
    given, made = _read_along(flow, weight, axis_in), _read_along(flow, weight, axis_out)
    if groups > 1:
        depthwise = weight.shape[1 if not transposed else 0] == (1 if not transposed else groups)
        if depthwise and not (transposed and weight.shape[1] > 1):
            given, made = _depthwise(flow, weight, groups, transposed)
            reads = False
        else:
            given, made = _grouped(flow, weight, made if not transposed else given, transposed)
            reads = True
    else:
        reads = True
    if read is not None and given is not None:
        channels.tie_lines(read, given)
    elif read is not None and weight.shape[axis_in] * (1 if transposed else groups) > 1:
        flow.stick([torch.from_numpy(read)], f"it is read by a convolution{flow.where()} whose weight is not followed")
    if reads and (read if read is not None else given) is not None:
        line_read = read if read is not None else given
        assert line_read is not None
        flow.flow.meetings.append(
            Meeting(
                "reads",
                flow.calls[call.name] - 1,
                flow.module,
                line_read,
                call.name,
                0,
                dim,
                owner=flow.owner(weight, made if groups > 1 else given),
            )
        )
    labels = [] if made is None else [along(made, dim, call.out.ndim)]
    if bias is not None:
        labels += [along(line(label), dim, call.out.ndim) for label in flow.get(bias)]
    flow.set(call.out, channels.merged(labels))


def _depthwise(
    flow: Follower, weight: torch.Tensor, groups: int, transposed: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Lines of inputs and outputs: a channel goes with the filters that are applied to it."""
    own = _read_along(flow, weight, 0)
    if own is None:
        return None, None
    if transposed:
        return own, own
    by_input = own.reshape(groups, -1)
    for column in range(1, by_input.shape[1]):
        flow.flow.channels.tie_lines(by_input[:, 0].copy(), by_input[:, column].copy())
    return by_input[:, 0].copy(), own


def _grouped(
    flow: Follower, weight: torch.Tensor, whole: np.ndarray | None, transposed: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Lines of inputs and outputs of a grouped convolution, one of which its weight has only group by group."""
    name = flow.owner(weight, whole)
    virtual = flow.grouped.get((name, "filters" if transposed else "inputs"))
    if whole is None or virtual is None:
        flow.stick(flow.get(weight), f"it is a grouped convolution{flow.where()} whose weight is computed")
        return None, None
    return (whole, virtual) if transposed else (virtual, whole)


def _batch_norm(flow: Follower, call: Call) -> None:
    """Statistics over all dimensions but 1, unless they are given; scale and shift along it."""
    source = call.args[0]
    labels, held = [], []
    for label in flow.get(source):
        dims = varying(label)
        if 1 in dims or not dims:
            labels.append(flow.flow.channels.tie_along(label, [dim for dim in dims if dim != 1]))
        else:
            held.append(label)
    for tensor in call.args[1:5]:
        labels += [along(line(label), 1, source.ndim) for label in flow.get(tensor)]
    merged = flow.flow.channels.merged(labels)
    statistics = [along(line(label), 0, 1) for label in merged]
    for position, tensor in enumerate(call.outputs):
        flow.set(tensor, [*merged, *held] if position == 0 else statistics)
    if held:
        training = bool(call.argument("training", call.argument("train", False)))
        if not training and "no_training" in call.name:
            return
        _hold(flow, call, held)


def _layer_norm(flow: Follower, call: Call) -> None:
    source, shape = call.args[0], list(call.args[1])
    first = source.ndim - len(shape)
    inside = [label for label in flow.get(source) if any(dim >= first for dim in varying(label))]
    outside = [label for label in flow.get(source) if all(dim < first for dim in varying(label))]
    weights = [call.argument("weight"), call.argument("bias")]
    if len(shape) > 1:
        affected = inside + [label for tensor in weights for label in flow.get(tensor)]
        flow.stick(affected, f"{flow.module or 'it'} normalises over {len(shape)} dimensions at once")
        inside = []
    else:
        inside = [
            flow.flow.channels.tie_along(label, [dim for dim in varying(label) if dim != first]) for label in inside
        ]
        held = list(inside)
        for tensor in weights:
            inside += [along(line(label), first, source.ndim) for label in flow.get(tensor)]
    merged = flow.flow.channels.merged([*outside, *inside])
    outputs = call.outputs
    flow.set(outputs[0], merged)
    for tensor in outputs[1:]:
        flow.set(tensor, outside)
    if len(shape) == 1 and held:
        _hold(flow, call, held)


def _group_norm(flow: Follower, call: Call) -> None:
    source, groups = call.args[0], int(call.argument("group"))
    read = _read_along(flow, source, 1)
    labels = [] if read is None else [along(read, 1, source.ndim)]
    for tensor in (call.argument("weight"), call.argument("bias")):
        labels += [along(line(label), 1, source.ndim) for label in flow.get(tensor)]
    merged = flow.flow.channels.merged(labels)
    flow.set(call.outputs[0], merged)
    for label in merged:
        if groups > 1:
            flow.flow.blocks.append((line(label), groups, f"the groups of {flow.module or 'a group norm'}"))
        _hold(flow, call, [label])


_FRESH = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full bernoulli "
    "new_empty_strided local_scalar_dense _local_scalar_dense is_same_size sym_size equal allclose isnan".split()
)
"""Operations whose results do not depend on channels' values, or are no tensors."""

_VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"))

_TURNS = frozenset(("permute", "transpose", "t", "unsqueeze", "expand"))

_MOVES = (
    *_VIEWS,
    *"permute transpose t unsqueeze squeeze expand slice select split split_with_sizes unsafe_split unbind flip repeat "
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d im2col unfold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll index "
    "index_select as_strided diagonal".split(),
)
_PLAIN = "clone _to_copy detach alias copy contiguous _prelu_kernel masked_fill lift_fresh _conj dropout where".split()
_STATISTICS = (
    "mean sum amax amin max min var std var_mean std_mean linalg_vector_norm norm prod logsumexp argmax argmin any all "
    "median nansum"
).split()
_PLACES = (
    "max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bicubic2d_aa max_pool2d max_pool3d"
).split()

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_PLAIN, _pointwise),
    **dict.fromkeys(_STATISTICS, _reduce),
    **dict.fromkeys(_PLACES, _spatial),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul"), _matmul),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), _softmax),
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_batch_norm_no_update": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
}
