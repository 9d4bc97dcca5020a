"""Sums of products of layers' inputs over the calibration set, for compensation (pruning/moments.py).

Images are processed in chunks that are always the same, and the chunks' sums are added in the same order. So the sums
are equal to the last bit for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from laasp_ray.pruning.moments import Gram
from laasp_ray.pruning.readers import Reader
from laasp_ray.search.activations import chunks_of
from laasp_ray.search.evaluate import Calibration
from laasp_ray.search.memory import retried
from laasp_ray.search.precision import full_precision

PATCHES, MOST_IMAGES = 20_000, 1000
"""About so many patches of a layer's input are taken, as many of each image: at places that differ between images. So
many images are enough; they are the first of the calibration set, which is shuffled.
"""
CHUNKS = 8
"""The largest number of chunks. Each chunk's sums are sent to the process that adds them."""
MOST_BYTES = 2_000_000_000
"""The most memory of the sums that are made in one pass over the images, unless `search.memory_mb` is set."""

Grams = Mapping[str, Gram]


def grams(
    model: nn.Module, calibration: Calibration, readers: Iterable[Reader], memory_bytes: int = 0
) -> dict[str, Gram]:
    """The sums of every reader. `model` is in eval mode on the calibration set's device and is not changed."""
    found: dict[str, Gram] = {}
    for part in parts(readers, memory_bytes):
        chunks = gram_chunks(len(calibration), calibration.batch_size)
        found |= added(grams_of(model, calibration, part, chunk) for chunk in chunks)
    return found


def parts(readers: Iterable[Reader], memory_bytes: int = 0) -> Iterator[tuple[Reader, ...]]:
    """Readers in parts whose sums fit into memory together; each part needs a pass over the images."""
    part: list[Reader] = []
    for reader in readers:
        if part and sum(one.gram_bytes for one in (*part, reader)) > (memory_bytes or MOST_BYTES):
            yield tuple(part)
            part = []
        part.append(reader)
    if part:
        yield tuple(part)


def gram_chunks(images: int, batch_size: int) -> list[np.ndarray]:
    """Positions of the images that are used, in at most CHUNKS chunks of whole batches."""
    return chunks_of(min(images, MOST_IMAGES), batch_size, CHUNKS)


def added(chunks: Iterable[Grams]) -> dict[str, Gram]:
    """The sums over all chunks, in their order."""
    total: dict[str, Gram] = {}
    for chunk in chunks:
        for layer, gram in chunk.items():  # one by one, so that no third copy of all sums is in memory
            total[layer] = total[layer].plus(gram) if layer in total else gram
    return total


@full_precision()
@torch.no_grad()
def grams_of(
    model: nn.Module, calibration: Calibration, readers: Sequence[Reader], chunk: np.ndarray
) -> dict[str, Gram]:
    """The sums over the images at `chunk` (n,), on the CPU."""
    device = calibration.device
    sums = {
        reader.layer: torch.zeros(
            reader.groups, reader.inputs + 1, reader.inputs + 1, dtype=torch.float64, device=device
        )
        for reader in readers
    }
    each = max(1, math.ceil(PATCHES / min(len(calibration), MOST_IMAGES)))
    for start in range(0, len(chunk), calibration.batch_size):
        positions = chunk[start : start + calibration.batch_size]
        what = f"a batch of {len(positions)} images, whose values layers are compensated by,"
        # Nothing is added before the batch is through, because it may be repeated.
        found = retried(
            lambda positions=positions: _of_batch(model, calibration, readers, each, positions),  # type: ignore[misc]
            what,
            "lower search.batch_size",
        )
        for layer, values in found:
            # Half precision would round the products more than the ridge, and float16 overflows.
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            with_constant = torch.cat([values, values.new_ones(*values.shape[:2], 1)], 2)
            sums[layer] += torch.matmul(with_constant.transpose(1, 2), with_constant)
    return {layer: Gram(total.cpu()) for layer, total in sums.items()}


def _of_batch(
    model: nn.Module, calibration: Calibration, readers: Sequence[Reader], each: int, positions: np.ndarray
) -> list[tuple[str, torch.Tensor]]:
    """The patches of each call of a reader, with its layer."""
    found: list[tuple[str, torch.Tensor]] = []

    def hook_of(reader: Reader) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = given[0] if given else named["input"]
            found.append((reader.layer, patches(module, inputs, reader, each, positions)))

        return keep

    hooks = [
        model.get_submodule(reader.layer).register_forward_pre_hook(hook_of(reader), with_kwargs=True)
        for reader in readers
    ]
    try:
        calibration.run(model, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def patches(module: nn.Module, inputs: torch.Tensor, reader: Reader, each: int, positions: np.ndarray) -> torch.Tensor:
    """Values (groups, n, inputs of a group) that the layer reads at `each` places of each image, or all if there are
    fewer. `positions` (B,) are the images' in the calibration set; they say which places.
    """
    if len(inputs) != len(positions):  # the network folds something into the batch: each row counts as an image
        each = max(1, each * len(positions) // len(inputs))
        positions = np.arange(len(inputs))
    if isinstance(module, nn.Linear):
        return _of_linear(inputs, reader, each, positions)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dims = len(module.kernel_size)
    if reader.mixed:  # channels at a place of the input
        sizes, kernel, stride, dilation = tuple(inputs.shape[2:]), (1,) * dims, (1,) * dims, (1,) * dims
        values = inputs
    else:
        kernel, stride, dilation = module.kernel_size, _each(module.stride, dims), _each(module.dilation, dims)
        padding = _padding(module, dilation)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        values = functional.pad(inputs, padding, mode=mode) if any(padding) else inputs
        sizes = tuple(
            (size - rate * (width - 1) - 1) // step + 1
            for size, width, step, rate in zip(values.shape[2:], kernel, stride, dilation, strict=True)
        )
    places = _places(math.prod(sizes), each, positions)  # (B, p)
    index = np.unravel_index(places, sizes)
    image = torch.arange(len(values), device=values.device).reshape(-1, *[1] * (dims + 1))
    spatial = []
    for dim, (at, width, step, rate) in enumerate(zip(index, kernel, stride, dilation, strict=True)):
        start = torch.as_tensor(at * step, device=values.device).reshape(*places.shape, *[1] * dims)
        offsets = torch.arange(width, device=values.device) * rate
        spatial.append(start + offsets.reshape(*[1] * (2 + dim), -1, *[1] * (dims - 1 - dim)))
    found = values.movedim(1, -1)[(image, *spatial)]  # (B, p, kernel..., channels)
    found = found.movedim(-1, 2).flatten(0, 1)  # (n, channels, kernel...)
    return found.reshape(len(found), reader.groups, -1).transpose(0, 1)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, dilation: tuple[int, ...]) -> list[int]:
    """What the layer's forward pass adds before and after each dimension, the last one first.

    For zeros that is what its attributes say now; other modes take what they said when the layer was made.
    """
    if module.padding_mode != "zeros":
        return list(module._reversed_padding_repeated_twice)
    if module.padding == "same":
        around = [rate * (width - 1) for rate, width in zip(dilation, module.kernel_size, strict=True)]
        sides = [(each // 2, each - each // 2) for each in around]
    elif module.padding == "valid":
        sides = [(0, 0)] * len(dilation)
    else:
        sides = [(each, each) for each in _each(module.padding, len(dilation))]
    return [side for pair in reversed(sides) for side in pair]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each dimension. Torch takes one for all, alone or in a tuple."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _of_linear(inputs: torch.Tensor, reader: Reader, each: int, positions: np.ndarray) -> torch.Tensor:
    if reader.mixed:  # (B, channels * block) -> every feature has the channels
        rows = inputs.reshape(len(inputs), -1, reader.inputs, reader.block)
        rows = rows.transpose(2, 3).flatten(1, 2)
    else:
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    places = torch.as_tensor(_places(rows.shape[1], each, positions), device=inputs.device)
    return rows.gather(1, places.unsqueeze(2).expand(-1, -1, rows.shape[2])).flatten(0, 1).unsqueeze(0)


def _places(places: int, each: int, positions: np.ndarray) -> np.ndarray:
    """Places (images, p), evenly spaced, that begin at another one in every image."""
    count = min(places, each)
    first = positions * 7919 % places  # a prime, so that neighbours in the set begin far from each other
    return np.asarray((first[:, None] + np.arange(count) * places // count) % places)
