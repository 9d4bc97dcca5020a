"""Measures BatchNorm statistics again on the calibration set: for scoring the current network, or to stay in it.

A prune changes the inputs of later layers. Until these layers are trained again, the running statistics of their
BatchNorms belong to the earlier network, and they affect every measured loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from laasp_ray.errors import ConfigError, is_out_of_memory
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.search.evaluate import Calibration
from laasp_ray.search.memory import retried
from laasp_ray.search.precision import full_precision

BATCH = 128
"""The number of images in a batch. Statistics depend on which images share a batch, so it does not depend on the
process or on the memory.
"""
ENOUGH = 1000
"""The calibration images for statistics that stay in a network after a prune. Each has many positions, and each
iteration measures them again.
"""


@full_precision()
@torch.no_grad()
def reestimate(
    model: nn.Module, calibration: Calibration, behind: Collection[str] = (), images: int | None = None
) -> dict[str, torch.Tensor]:
    """`running_mean` and `running_var` of every BatchNorm of `model`, by their names in its state dict, on the CPU.

    `model` is in eval mode on the calibration set's device, and is not changed. All images go through it once, in their
    order, in ceil(images / BATCH) batches whose sizes differ by at most one. BatchNorms normalise by each batch's own
    mean and variance, as in training; all other modules (dropout, for example) are in eval mode. `running_mean` is the
    mean of the batches' means over positions and images. `running_var` is the mean of their unbiased variances. Each
    batch is weighted by its number of images; for equal batches this equals torch's `momentum=None`. A BatchNorm that
    runs several times averages over all its calls. One that keeps no statistics is left out. With layers `behind` only
    those are measured that these layers' outputs go into, and the others normalise as they are. With `images` only so
    many are used, the first, as the set is shuffled.

    Raises MemoryShortError if a batch needs more memory than there is: `search.memory_mb` does not limit this.
    """
    count = min(images or len(calibration), len(calibration))
    batches = np.array_split(np.arange(count), math.ceil(count / BATCH))
    what = f"one of the batches of {len(batches[0])} images, which BatchNorm statistics are measured on,"
    remedy = "leave out search.reestimate_batchnorm and prune.reestimate_batchnorm"
    return retried(lambda: _reestimate(model, calibration, batches, behind), what, remedy)


def _reestimate(
    model: nn.Module, calibration: Calibration, batches: Sequence[np.ndarray], behind: Collection[str]
) -> dict[str, torch.Tensor]:
    network = clone_sharing_parameters(model).eval()
    norms = norms_of(network)
    if behind:
        reached = _reached_by(network, calibration, behind, set(norms.values()))
        norms = {name: norm for name, norm in norms.items() if norm in reached}
    if not norms:
        return {}
    seen = dict.fromkeys(norms.values(), 0)

    def weigh(module: _BatchNorm, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        images = len(_input_of(given, named))
        seen[module] += images
        module.momentum = images / seen[module]  # makes the running average the mean over all images so far

    for module in seen:
        module.reset_running_stats()
        module.train().register_forward_pre_hook(weigh, with_kwargs=True)
    for positions in batches:
        calibration.run(network, positions)
    return {
        f"{name}.{kind}": module.get_buffer(kind).cpu()
        for name, module in norms.items()
        for kind in ("running_mean", "running_var")
    }


def _reached_by(
    model: nn.Module, calibration: Calibration, layers: Collection[str], norms: Collection[_BatchNorm]
) -> set[_BatchNorm]:
    """Those of `norms` that the outputs of `layers` may go into.

    The others have the same inputs, to the last bit, with two other outputs of the layers in place. Where the network
    cannot be run so, or does not call one of the layers, all of `norms` are meant.
    """
    called: set[str] = set()

    def inputs_with(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[_BatchNorm, list[torch.Tensor]]:
        inputs: dict[_BatchNorm, list[torch.Tensor]] = {norm: [] for norm in norms}

        def replaced(name: str) -> Any:
            def hook(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
                called.add(name)
                return change(output)

            return hook

        def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs[module].append(_input_of(given, named).clone())  # type: ignore[index]

        hooks = [model.get_submodule(name).register_forward_hook(replaced(name)) for name in layers]
        hooks += [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in inputs]
        try:
            calibration.run(model, np.arange(1))
        finally:
            for hook in hooks:
                hook.remove()
        return inputs

    plain = inputs_with(lambda output: output)
    reached: set[_BatchNorm] = set()
    try:
        for change in (lambda output: -output - 1, lambda output: 3 * output + 1):
            changed = inputs_with(change)
            reached |= {norm for norm in plain if not _equal(plain[norm], changed[norm])}
    except Exception as error:  # the network's own code may look at its values
        if is_out_of_memory(error):
            raise
        return set(norms)
    return reached if called == set(layers) else set(norms)


def _equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _input_of(given: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """What a BatchNorm is called with."""
    found = given[0] if given else named["input"]
    assert isinstance(found, torch.Tensor)
    return found


def check_statistics(model: nn.Module) -> None:
    """Raises ConfigError for a BatchNorm that keeps no running statistics.

    In eval mode it normalises by the statistics of the batch. A loss would then depend on which images share a batch:
    on `search.batch_size`, on the free memory and on the process.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None):
            raise ConfigError(
                f"{name or 'the network'} is a BatchNorm without running statistics, which makes the loss of an image "
                "depend on the others in its batch: make it with track_running_stats=True, or use another norm"
            )


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorms that keep running statistics, by name. One with several names is listed under each."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, _BatchNorm) and module.track_running_stats}


def with_statistics(network: NetworkState, statistics: Mapping[str, torch.Tensor]) -> NetworkState:
    """The network with `statistics` in place of its own tensors of these names."""
    return NetworkState(network.plan, {**network.tensors, **statistics})
