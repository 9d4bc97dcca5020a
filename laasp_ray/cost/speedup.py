"""Why a pruned network is not faster, from the shapes of its layers, with the setting that would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.models.copying import deep_copy

ALIGNED = 8
"""Kernels work on so many channels at a time: a layer with one more pays for the next so many."""
MEMORY_BOUND = 10.0
"""Multiply-accumulates for each byte that a layer reads or writes; with fewer it waits for memory, on most devices."""
FASTER = 0.97
"""A network whose median is above this share of the unpruned one's is not called faster."""


@dataclass(frozen=True)
class LayerWork:
    """What a convolution or linear layer does for one batch, over all its calls; `moved_bytes` are of its inputs,
    outputs and weights.
    """

    channels: tuple[int, int]
    macs: int
    moved_bytes: int

    @property
    def intensity(self) -> float:
        """Multiply-accumulates for each byte moved."""
        return self.macs / self.moved_bytes if self.moved_bytes else 0.0


def layer_work(model: nn.Module, input_shape: Sequence[int], batch_size: int) -> dict[str, LayerWork]:
    """Convolution or linear layer -> its work. One input is run on a copy of `model`, on the CPU."""
    probe = deep_copy(model).cpu().eval()
    found: dict[str, LayerWork] = {}

    def note(name: str, layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
        weight = layer.get_parameter("weight")
        transposed = getattr(layer, "transposed", False)
        positions = (inputs if transposed else output).numel() // weight.shape[0]
        macs = batch_size * positions * weight.numel()
        moved = (batch_size * (inputs.numel() + output.numel()) + weight.numel()) * weight.element_size()
        before = found.get(name)
        channels = (_width(layer, "in"), _width(layer, "out"))
        found[name] = LayerWork(
            channels, macs + (before.macs if before else 0), moved + (before.moved_bytes if before else 0)
        )

    for name, module in probe.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            module.register_forward_hook(
                lambda layer, inputs, output, name=name: note(name, layer, inputs[0], output)  # type: ignore[misc]
            )
    with torch.inference_mode():
        probe(torch.zeros(1, *input_shape))
    return found


def _width(layer: nn.Module, side: str) -> int:
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    return int(getattr(layer, f"{side}_{kind}"))


def is_faster(unpruned_ms: float, pruned_ms: float) -> bool:
    return pruned_ms <= FASTER * unpruned_ms


def why_not_faster(unpruned: nn.Module, pruned: nn.Module, input_shape: Sequence[int], batch_size: int) -> str:
    """The reasons that the layers of the pruned network show, each with the setting that would help, as one sentence.

    Layers that lost a multiple of ALIGNED channels are named with their share of the multiply-accumulates, and so are
    layers that are bound by memory.
    """
    before = layer_work(unpruned, input_shape, batch_size)
    after = layer_work(pruned, input_shape, batch_size)
    total = sum(layer.macs for layer in after.values())
    ragged = [name for name, layer in after.items() if name in before and _lost_alignment(before[name], layer)]
    bound = [name for name, layer in after.items() if layer.intensity < MEMORY_BOUND]
    reasons = []
    if ragged:
        reasons.append(
            f"{len(ragged)} of {len(after)} layers ({_share(after, ragged, total)} of the multiply-accumulates) have "
            f"channel counts that are no longer a multiple of {ALIGNED}: --set prune.round_to={ALIGNED} keeps them"
        )
    if bound:
        reasons.append(
            f"{len(bound)} of {len(after)} layers ({_share(after, bound, total)}) are bound by memory at this batch, "
            f"with fewer than {MEMORY_BOUND:g} multiply-accumulates a byte: --latency-reduction prunes until the "
            "measured time has fallen, and a larger batch uses weights more often"
        )
    if not reasons:
        reasons.append(
            "its layers show no reason; what is not in them (normalisation, activations, starting each operation) "
            "takes the time: --latency-reduction prunes until the measured time has fallen"
        )
    return "; ".join(reasons)


def _lost_alignment(before: LayerWork, after: LayerWork) -> bool:
    return any(was % ALIGNED == 0 and now % ALIGNED for was, now in zip(before.channels, after.channels, strict=True))


def _share(work: dict[str, LayerWork], names: Sequence[str], total: int) -> str:
    return f"{sum(work[name].macs for name in names) / total:.0%}" if total else "0%"
