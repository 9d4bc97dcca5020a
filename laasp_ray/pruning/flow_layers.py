"""Rules (flow_rules.py) for layers: convolutions, matrix products and normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from laasp_ray.pruning.flow import Call, Follower, Meeting
from laasp_ray.pruning.labels import Label, along, line, varying


def hold(flow: Follower, call: Call, labels: Sequence[Label]) -> None:
    kept = tuple(tuple(flow.get(tensor)) for tensor in call.outputs)
    channels = np.unique(np.concatenate([label.numpy().reshape(-1) for label in labels]))
    flow.flow.meetings.append(Meeting("holds", flow.calls[call.name] - 1, flow.module, channels, call.name, kept=kept))


def matmul(flow: Follower, call: Call) -> None:
    """(..., n, k) x (..., k, m), with or without an added term."""
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
    if (len(call.args) > 2 and call.name.startswith("add")) or call.name == "baddbmm":
        labels += [label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape)) for label in flow.get(call.args[0])]
    flow.set(call.out, flow.flow.channels.merged(labels))


def _without(label: Label, dim: int, ndim: int, *, front: bool) -> Label:
    """The label of a factor in the product: its rows or columns, and the batch dimensions."""
    rest = label.squeeze(dim)
    batch, own = (rest.shape[:-1], rest.shape[-1:]) if rest.ndim else ((), ())
    if not own:
        return label.reshape((1,) * ndim)
    shape = (*batch, *own, 1) if front else (*batch, 1, *own)
    if len(shape) > ndim:  # a vector has no rows or columns
        shape = (*batch, *own)
    return rest.reshape((1,) * (ndim - len(shape)) + tuple(shape))


def _read_along(flow: Follower, tensor: torch.Tensor, dim: int) -> np.ndarray | None:
    """The line of channels along `dim`. Channels that vary across `dim` too are tied."""
    found = None
    for label in flow.get(tensor):
        if dim in varying(label):
            label = flow.flow.channels.tie_along(label, [other for other in varying(label) if other != dim])
            found = line(label)
    return found


def convolution(flow: Follower, call: Call) -> None:
    inputs, weight, bias = call.args[:3]
    transposed, groups = bool(call.argument("transposed", False)), int(call.argument("groups", 1))
    channels = flow.flow.channels
    batched = inputs.ndim == weight.ndim
    dim = 1 if batched else 0
    read = _read_along(flow, inputs, dim)
    others = [label for label in flow.get(inputs) if dim not in varying(label)]
    flow.stick(others, f"a convolution{flow.where()} runs along its channels, not over places")
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
        if not reads:
            channels.unmet.append(given[read == 0])
    elif read is not None and weight.shape[axis_in] * (1 if transposed else groups) > 1:
        why = flow.refused.get(flow.module, f"it is read by a convolution{flow.where()} whose weight is not followed")
        flow.stick([torch.from_numpy(read)], why)
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
    """Lines of inputs and outputs. A channel is tied to the filters that are applied to it."""
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
    """Lines of inputs and outputs of a grouped convolution. Its weight has one of them only group by group."""
    name = flow.owner(weight, whole)
    virtual = flow.grouped.get((name, "filters" if transposed else "inputs"))
    if whole is None or virtual is None:
        flow.stick(flow.get(weight), f"it is a grouped convolution{flow.where()} whose weight is computed")
        return None, None
    return (whole, virtual) if transposed else (virtual, whole)


def batch_norm(flow: Follower, call: Call) -> None:
    """Statistics over all dimensions but 1, unless they are given. Scale and shift are along dimension 1."""
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
        hold(flow, call, held)


def layer_norm(flow: Follower, call: Call) -> None:
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
        inside += _bare(flow, first, source)
    merged = flow.flow.channels.merged([*outside, *inside])
    outputs = call.outputs
    flow.set(outputs[0], merged)
    for tensor in outputs[1:]:
        flow.set(tensor, outside)
    if len(shape) == 1 and held:
        hold(flow, call, held)


def group_norm(flow: Follower, call: Call) -> None:
    source, groups = call.args[0], int(call.argument("group"))
    read = _read_along(flow, source, 1)
    labels = [] if read is None else [along(read, 1, source.ndim)]
    for tensor in (call.argument("weight"), call.argument("bias")):
        labels += [along(line(label), 1, source.ndim) for label in flow.get(tensor)]
    labels += _bare(flow, 1, source)
    merged = flow.flow.channels.merged(labels)
    flow.set(call.outputs[0], merged)
    for label in merged:
        if groups > 1:
            flow.flow.blocks.append((line(label), groups, f"the groups of {flow.module or 'a group norm'}"))
        hold(flow, call, [label])


def _bare(flow: Follower, dim: int, source: torch.Tensor) -> list[Label]:
    """The channels of a norm without scales and offsets, of which only an attribute says how many there are."""
    numbers = flow.flow.bare.get(flow.module)
    return [along(numbers, dim, source.ndim)] if numbers is not None and len(numbers) == source.shape[dim] else []
