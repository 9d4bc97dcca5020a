"""bench/gpu.py, training: the product's loop against the bare forward and backward pass, on images in memory."""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_networks import device_of
from gpu_results import Rows
from reference import synchronise
from step import InMemory
from torch import nn
from torch.nn import functional

from laasp_ray import models
from laasp_ray.config import ModelConfig, TrainConfig
from laasp_ray.models.format import in_format_of, to_channels_last
from laasp_ray.train.loop import EpochPlan, TrainingPhase, run_training_phase

AIM = 0.95
"""Images a second, of those of the bare loop."""
SEPARATE = 10
"""Steps before the clock starts: kernels are chosen and memory is taken in the first ones."""


@dataclass(frozen=True)
class Mode:
    name: str
    autotune: bool = False
    compile: bool = False


EAGER, AUTOTUNED = Mode("eager"), Mode("autotuned", autotune=True)
COMPILED = Mode("compiled", autotune=True, compile=True)


def synthetic(options: argparse.Namespace, rows: Rows) -> None:
    """Eager and autotuned, at each batch size."""
    for batch in (4,) if options.toy else (256, 128, 32):
        for mode in (AUTOTUNED, EAGER):
            with rows.trying(f"{mode.name}, {batch} images a step"):
                compare(options, rows, batch, mode)
    with rows.trying("waits of a step"):
        waits(options, rows)


def compiled(options: argparse.Namespace, rows: Rows) -> None:
    """The same compiled, the size first that most train with. Each size is compiled anew, twice: bare and ours."""
    for batch in (4,) if options.toy else (256, 128, 32):
        with rows.trying(f"compiled, {batch} images a step"):
            compare(options, rows, batch, COMPILED)


def compare(options: argparse.Namespace, rows: Rows, batch: int, mode: Mode) -> None:
    device, steps = device_of(options), steps_of(options, batch)
    data = InMemory(batch, SEPARATE + steps if not options.toy else 2 + steps, device, side_of(options), 1000)
    bare = batch * steps / bare_seconds(data, mode, steps)
    ours = batch * steps / product_seconds(data, mode, steps)
    figures = {"images a second": ours, "bare": bare, "of bare": ours / bare}
    if device.type == "cuda":
        figures["memory GB"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    what = f"{mode.name}, {batch} images a step"
    rows.add(what, figures, None if options.toy else ours / bare >= AIM)


def steps_of(options: argparse.Namespace, batch: int) -> int:
    """The timed steps: about 6,000 images on a GPU."""
    return 2 if options.toy else min(60, 6144 // batch)


def side_of(options: argparse.Namespace) -> int:
    return 32 if options.toy else 224


def network_on(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    # A rehearsal's network is smaller, too.
    builder = "torchvision.resnet50" if device.type == "cuda" else "torchvision.resnet18"
    config = ModelConfig(builder=builder, arguments={"num_classes": 1000})
    model = models.build(config).to(device)
    return to_channels_last(model) if device.type == "cuda" else model


def bare_seconds(data: InMemory, mode: Mode, steps: int) -> float:
    """The seconds of the last `steps` steps of the plain loop, in bf16 on a GPU, on tensors that are there."""
    device, on_gpu = data.device, data.device.type == "cuda"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not mode.autotune, mode.autotune
    model = network_on(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=on_gpu or None
    )
    run = torch.compile(model, dynamic=False) if mode.compile else model
    images, labels = (in_format_of(model, part) for part in (data.images, data.labels))
    batches = list(zip(images.split(data.share), labels.split(data.share), strict=True))
    clock = Clock(len(batches) - steps, len(batches), device)
    for pictures, of in batches:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            output = run(pictures)
        loss = functional.cross_entropy(output.float(), of)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        clock.step()
    return clock.stop()


def product_seconds(data: Any, mode: Mode, steps: int, batches: int | None = None, **changes: Any) -> float:
    """The seconds of the last `steps` steps of an epoch of the product's loop on the same."""
    batches = batches or -(-data.train_images // data.share)
    clock = Clock(batches - steps, batches, data.device)
    run_epoch(data, mode, clock.beat, **changes)
    return clock.stop()


def run_epoch(data: Any, mode: Mode, heartbeat: Callable[[], None], **changes: Any) -> None:
    config = TrainConfig(
        epochs=1, prune_epoch=0, batch_size=data.share, autotune=mode.autotune, compile=mode.compile, **changes
    )
    phase = TrainingPhase(number=0, phase="fine-tune", epochs=(EpochPlan(0, 0, 0.01),))
    events: Iterator[Any] = run_training_phase(
        network_on(data.device), {}, phase, data=data, config=config, seed=0, heartbeat=heartbeat
    )
    next(events)


class Clock:
    """Seconds from the end of step number `first` to that of number `last`. Only at these two the device is waited
    for."""

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self._first, self._last = first, last
        self._wait = functools.partial(synchronise, torch.empty(0, device=device))
        self._steps, self._beats = 0, 0
        self._began = self._ended = 0.0

    def beat(self) -> None:
        """The product's heartbeat: one when a batch has come, and one when the step is done."""
        self._beats += 1
        if self._beats % 2 == 0:
            self.step()

    def step(self) -> None:
        self._steps += 1
        if self._steps in (self._first, self._last):
            self._wait()
        if self._steps == self._first:
            self._began = time.perf_counter()
        elif self._steps == self._last:
            self._ended = time.perf_counter()

    def stop(self) -> float:
        if not self._ended:
            raise RuntimeError(f"{self._steps} steps were seen, {self._last} expected")
        return self._ended - self._began


def waits(options: argparse.Namespace, rows: Rows) -> None:
    """How many operations of a step make the host wait for the device, as torch itself counts them."""
    device = device_of(options)
    if device.type != "cuda":
        rows.add("waits of a step", {"note": "counted on a GPU only"})
        return

    def counted(steps: int) -> int:
        data = InMemory(32, steps, device, side_of(options), 1000)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                run_epoch(data, EAGER, lambda: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in found)

    few, many = counted(3), counted(11)
    rows.add("waits of a step", {"each": (many - few) / 8, "an epoch": few}, many == few)
