"""The effect of each operation on the channels of its tensors (flow.py). Operations have their names in
PyTorch's ATen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from laasp_ray.pruning.flow import Call, Follower, tensors_of
from laasp_ray.pruning.flow_layers import batch_norm, convolution, group_norm, hold, layer_norm, matmul
from laasp_ray.pruning.flow_moves import VIEWS, article, concatenate, move, pointwise
from laasp_ray.pruning.labels import varying

logger = logging.getLogger(__name__)

Rule = Callable[[Follower, Call], None]


def follow(flow: Follower, call: Call) -> None:
    """Labels the results of an operation, and records its conditions on the channels that it reads."""
    name = call.name
    if name in _FRESH:
        return
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in call.func.tags:
        rule = pointwise
    if rule is None:
        _unknown(flow, call)
        return
    try:
        rule(flow, call)
    except Exception:  # the rule does not know this form: its channels stay, others can be pruned
        logger.debug("the rule for %s failed", name, exc_info=True)
        _unknown(flow, call)


def _unknown(flow: Follower, call: Call) -> None:
    labels = [label for tensor in tensors_of((call.args, call.kwargs)) for label in flow.get(tensor)]
    through = f"its channels pass through {call.name.strip('_')}{flow.where()}, which is not followed"
    flow.stick(labels, flow.refused.get(flow.module, through))


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
    if call.name in ("argmax", "argmin"):
        flow.stick(held, f"which of its channels is greatest is asked{flow.where()}")
    elif held:
        hold(flow, call, held)


def _softmax(flow: Follower, call: Call) -> None:
    source = call.args[0]
    dim = call.args[1] % source.ndim
    held, labels = [], []
    for label in flow.get(source):
        if varying(label) == (dim,):
            held.append(label)
        elif dim in varying(label):  # blocks of channels are weighted against each other, position by position
            label = flow.flow.channels.tie_along(label, [dim])
        labels.append(label)
    flow.set(call.out, labels)
    if held:
        hold(flow, call, held)


def _spatial(flow: Follower, call: Call) -> None:
    """Pooling and resizing: batch and channels stay, positions change."""
    source = call.args[0]
    digits = [int(letter) for letter in call.name if letter.isdigit()]
    places = digits[-1] if digits else source.ndim - 2
    if "linear" in call.name or "cubic" in call.name or "nearest" in call.name:
        places = source.ndim - 2
    fixed = range(source.ndim - places)
    passing = [label for label in flow.get(source) if set(varying(label)) <= set(fixed)]
    others = [label for label in flow.get(source) if not set(varying(label)) <= set(fixed)]
    flow.stick(others, f"its channels lie along a dimension that {article(call)} resizes{flow.where()}")
    for tensor in call.outputs:
        flow.set(tensor, passing)


_FRESH = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "bernoulli",
        "new_empty_strided",
        "local_scalar_dense",
        "_local_scalar_dense",
        "is_same_size",
        "sym_size",
        "equal",
        "allclose",
        "isnan",
    ]
)
"""Operations whose results do not depend on the values of channels, or are not tensors."""

_MOVES = (
    *VIEWS,
    *[
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "unbind",
        "flip",
        "repeat",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "im2col",
        "unfold",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "roll",
        "index",
        "index_select",
        "as_strided",
        "diagonal",
    ],
)
_PLAIN = [
    "clone",
    "_to_copy",
    "detach",
    "alias",
    "copy",
    "contiguous",
    "_prelu_kernel",
    "masked_fill",
    "lift_fresh",
    "_conj",
    "dropout",
    "where",
    "hardswish",
    "hardsigmoid",
    "mish",
    "relu6",
    "softplus",
    "softshrink",
    "hardshrink",
    "threshold",
    "log_sigmoid_forward",
    "rrelu_with_noise",
    "celu",
    "selu",
]
_STATISTICS = [
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "prod",
    "logsumexp",
    "argmax",
    "argmin",
    "any",
    "all",
    "median",
    "nansum",
]
_PLACES = [
    "max_pool1d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "max_pool2d",
    "max_pool3d",
]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(_PLAIN, pointwise),
    **dict.fromkeys(_STATISTICS, _reduce),
    **dict.fromkeys(_PLACES, _spatial),
    **dict.fromkeys(("cat", "stack"), concatenate),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul"), matmul),
    **dict.fromkeys(("convolution", "_convolution"), convolution),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), _softmax),
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "_batch_norm_no_update": batch_norm,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
}
