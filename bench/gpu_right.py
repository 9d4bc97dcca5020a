"""bench/gpu.py, what is right: losses against float64, choices, masks, batches, compensation, 2:4 kernels."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import search
import torch
from gpu_networks import Prepared, device_of, difference_of, large, of_layers, precise_losses, prepared, spread
from gpu_results import Rows

from laasp_ray.config import LaaspConfig, Precision
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Compensator, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready_with
from laasp_ray.search.grams import grams

CLOSE = 1e-3
"""The largest relative difference of a loss between two ways in float32. Random networks have 1.5e-4 by float32's own
rounding on few images, and TF32 rounds 8,192 times as coarsely."""
OWN = 1e-4, 10.0
"""Losses on the device may differ from float64's by so much, or by so many times what the CPU's float32 does."""
TIE = 1e-5
"""Two best losses that are closer may change places."""
OTHERS = ("torchvision.mobilenet_v2", "torchvision.convnext_tiny")
JOINT = 4


def losses(options: argparse.Namespace, rows: Rows) -> None:
    """Candidates' losses on the device against those of cut copies in float64 on the CPU, with the process's defaults
    and with TF32 and autotuning asked for."""
    for builder in ("cifar.resnet20", large(options), *OTHERS):
        with rows.trying(f"{builder}, losses"):
            small = builder.startswith("cifar.")
            side, images = (32, 64) if small else (224, 8)
            if options.toy:
                side, images = (32, 4) if small else (64, 2)
            network = prepared(options, builder, side=side, images=images)
            tasks = tasks_of(spread(network.proposals, 4 if options.toy else 60 if small else 16))
            against_float64(options, network, tasks, rows)


def against_float64(options: argparse.Namespace, network: Prepared, tasks: Sequence[LossTask], rows: Rows) -> None:
    """A row for the CPU's float32, and one for each setting of the device."""
    expected = precise_losses(network.model, tasks, network.images, network.labels)
    on_cpu = difference_of(measured(network, tasks, torch.device("cpu")).mean(1, dtype=np.float64), expected)
    rows.add(f"{network.name}, float32 on the CPU", {"largest relative difference": on_cpu})
    for setting, precision, context in SETTINGS:
        with rows.trying(f"{network.name}, {setting}"), context():
            found = measured(network, tasks, device_of(options), precision=precision).mean(1, dtype=np.float64)
            difference = difference_of(found, expected)
            same = int(found[:-1].argmin()) == int(expected[:-1].argmin())
            figures = {
                "candidates": len(tasks) - 1,
                "images": len(network.images),
                "same best": "yes" if same else "no",
                "largest relative difference": difference,
            }
            right = difference <= max(OWN[0], OWN[1] * on_cpu)
            rows.add(f"{network.name}, {setting}", figures, right if precision == "float32" else None)


@contextlib.contextmanager
def tf32_and_autotuning() -> Iterator[None]:
    """The process's settings as a user may have them, with which the search must not compute."""
    backends: Any = torch.backends
    before = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision, backends.cudnn.benchmark
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = "tf32"
    backends.cudnn.benchmark = True
    try:
        yield
    finally:
        backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision, backends.cudnn.benchmark = before


SETTINGS: tuple[tuple[str, Precision, Callable[[], contextlib.AbstractContextManager[None]]], ...] = (
    ("torch's defaults", "float32", contextlib.nullcontext),
    ("TF32 and autotuning on in the process", "float32", tf32_and_autotuning),
    ("search.precision=tf32", "tf32", contextlib.nullcontext),
)


def measured(
    network: Prepared,
    tasks: Sequence[LossTask],
    device: torch.device,
    *,
    precision: Precision = "float32",
    made: type[Engine] = Engine,
    untraced: str | None = None,
) -> np.ndarray:
    """Losses (tasks, images) as the search measures them."""
    images = CalibrationSet(network.images.to(device), network.labels.to(device), 250)
    engine = made(*ready_with(copy.deepcopy(network.model), images), precision=precision, untraced=untraced)
    found = engine.losses(tasks, np.arange(len(network.images)))
    if found.errors:
        raise RuntimeError(f"{len(found.errors)} candidates failed: {next(iter(found.errors.values()))}")
    return found.values


class OneByOne(Engine):
    """Branches run alone, as on a CPU."""

    def _sizes(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        return super()._sizes(*arguments, **keywords)[0], 1


class Together(Engine):
    """Branches of one place run together, also where a CPU would run them alone."""

    def _sizes(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        size, joint = super()._sizes(*arguments, **keywords)
        return size, max(joint, JOINT)


def choice(options: argparse.Namespace, rows: Rows) -> None:
    """The choice of a race, masks against cuts, branches alone against together, compensation."""
    device = device_of(options)
    networks = []
    for builder, side, images in (("cifar.resnet20", 32, 1000), (large(options), 224, 64)):
        with rows.trying(builder):
            if options.toy:
                side, images = 32, 60
            networks.append(prepared(options, builder, side=side, images=images))
    for network in networks:
        with rows.trying(f"{network.name}, race"):
            race(network, device, rows, spread(network.proposals, 8 if options.toy else 1000))
    for network in networks:
        with rows.trying(f"{network.name}, masked and cut"):
            few = tasks_of(spread(network.proposals, 4 if options.toy else 24))
            masked, cut = (measured(network, few, device, untraced=reason) for reason in ("", "cut for comparison"))
            compared(f"{network.name}, masked against cut", masked, cut, rows)
        with rows.trying(f"{network.name}, together"):
            few = tasks_of(of_layers(network.proposals, 2 if options.toy else 12))
            alone, together = (measured(network, few, device, made=made) for made in (OneByOne, Together))
            compared(f"{network.name}, branches together against one by one", together, alone, rows)
    for network in networks:
        with rows.trying(f"{network.name}, compensation"):
            compensation(options, network, device, rows)


def race(network: Prepared, device: torch.device, rows: Rows, proposals: Sequence[Any]) -> None:
    images, labels = network.images.to(device), network.labels.to(device)
    ways: list[tuple[bool, Precision]] = [(False, "float32"), (True, "float32"), (True, "bfloat16")]
    off, on, fast = (
        search.iteration(copy.deepcopy(network.model), proposals, images, labels, racing=racing, precision=precision)
        for racing, precision in ways
    )
    first, second = sorted(off.losses)[:2]
    figures = {
        "candidates": len(proposals),
        "images": len(images),
        "two best losses": f"{first:.6f}, {second:.6f}",
        "exhaustive s": off.seconds,
        "racing s": on.seconds,
        "racing in bfloat16 s": fast.seconds,
        "share of the passes": on.image_forwards / off.image_forwards,
    }
    tie = second - first <= TIE * first
    rows.add(f"{network.name}, the race's choice", figures, None if tie else on.best == off.best == fast.best)


def compared(what: str, found: np.ndarray, expected: np.ndarray, rows: Rows) -> None:
    difference = difference_of(found.mean(1, dtype=np.float64), expected.mean(1, dtype=np.float64))
    figures = {"tasks": len(found), "images": found.shape[1], "largest relative difference": difference}
    rows.add(what, figures, difference <= CLOSE)


def compensation(options: argparse.Namespace, network: Prepared, device: torch.device, rows: Rows) -> None:
    """Moments of the device against the CPU's, and compensated losses against cut and compensated copies in float64."""
    on_device, on_cpu = (compensator_on(network, where) for where in (device, torch.device("cpu")))
    differences = [
        float((group - other).norm() / other.norm())
        for layer in on_cpu.moments
        for group, other in zip(on_device.moments[layer].inverse, on_cpu.moments[layer].inverse, strict=True)
    ]
    figures = {"matrices": len(differences), "largest relative difference": max(differences)}
    rows.add(f"{network.name}, inverted moments against the CPU's", figures)
    config, example = LaaspConfig(flops_reduction=0.5, compensate="full"), torch.zeros(1, *network.images.shape[1:])
    macs = count_macs(network.model, example)
    base = measure_baseline(network.graph, macs, config)
    proposals = propose(network.model, network.graph, macs, base, config, made_up=on_device.made_up)
    tasks = tasks_of(spread(proposals, 3 if options.toy else 16))
    few = Prepared(
        network.name, network.model, network.images[:8], network.labels[:8], network.graph, network.proposals
    )
    expected = precise_losses(few.model, tasks, few.images, few.labels)
    found = measured(few, tasks, device).mean(1, dtype=np.float64)
    difference = difference_of(found, expected)
    what = f"{network.name}, compensated losses against float64"
    rows.add(what, {"candidates": len(tasks) - 1, "largest relative difference": difference}, difference <= CLOSE)


def compensator_on(network: Prepared, device: torch.device) -> Compensator:
    images = CalibrationSet(network.images.to(device), network.labels.to(device), 250)
    model, images = ready_with(copy.deepcopy(network.model), images)
    return CompensationMemory().at(
        network.model,
        network.graph,
        "full",
        Measured(capture(network.model, Plan.empty())),
        lambda _, readers: grams(model, images, readers),
    )


def kernels(options: argparse.Namespace, rows: Rows) -> None:
    """2:4 layers through torch's sparse kernels against the same layers dense."""
    import semi_structured

    from laasp_ray import models
    from laasp_ray.config import ModelConfig

    settings = argparse.Namespace(batch=32, repeats=20)
    torch.manual_seed(0)
    config = ModelConfig(builder="torchvision.resnet50")
    works = [(name, make, shape, torch.nn.Sequential) for name, (make, shape) in semi_structured.LAYERS.items()]
    works.append((config.builder, lambda: models.build(config), config.input_shape, lambda network: network))
    for name, make, shape, around in works:  # type: ignore[assignment]
        with rows.trying(f"2:4, {name}"):
            figures = semi_structured.compare(name, around(make()), shape, settings)
            rows.add(f"2:4, {name}, float16", figures, figures["sparse layers"] > 0 and figures["error"] < 1e-2)
