"""bench/gpu.py, the search: one iteration of ResNet-50, its speed against plain forward passes, and the reference."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import reference
import search
import torch
from gpu_networks import Prepared, device_of, large, of_layers, prepared, spread
from gpu_results import Rows
from gpu_right import OneByOne, Together, compensator_on

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.search.candidates import Proposal, measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready_with
from laasp_ray.search.precision import computing_in

IMAGES = 5000
AIM = 0.9
"""Forward passes a second, of those of the plain network at its best batch size."""
SHARE = 0.13
"""The share of the stage's time that one of its four iterations may take."""


@dataclass(frozen=True)
class Plain:
    """Images a second of the plain network, at the batch size and memory format at which it is fastest."""

    rate: float
    batch_size: int
    memory_format: torch.memory_format


def iteration(options: argparse.Namespace, rows: Rows) -> None:
    device = device_of(options)
    side, images = (32, 16) if options.toy else (224, IMAGES)
    began = time.monotonic()
    network = prepared(options, large(options), side=side, images=8)
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(images, 3, side, side, generator=generator, device=device)
    labels = torch.arange(images, device=device) % 10
    figures = {"seconds": time.monotonic() - began, "candidates": len(network.proposals)}
    rows.add(f"{network.name}, graph, proposals and images", figures)
    plain = fastest(network, inputs, rows, options)
    proposals = spread(network.proposals, 12) if options.toy else network.proposals
    count = images_that_fit(network, proposals, inputs, labels, SHARE * options.seconds)
    inputs, labels = inputs[:count], labels[:count]
    one = timed(network, proposals, inputs, labels, plain, rows, options, f"{network.name}, exhaustive", racing=False)
    timed(network, proposals, inputs, labels, plain, rows, options, f"{network.name}, racing", racing=True)
    with rows.trying(f"{network.name}, alone and together"):
        together(network, tasks_of(of_layers(proposals, 2 if options.toy else 8)), inputs[:250], labels[:250], rows)
    with rows.trying("resnet20, alone and together"):
        small = prepared(options, "cifar.resnet20", side=32, images=16 if options.toy else 1000)
        tasks = tasks_of(of_layers(small.proposals, 2 if options.toy else 12))
        together(small, tasks, small.images.to(device), small.labels.to(device), rows)
    with rows.trying(f"{network.name}, the reference procedure"):
        beside_reference(network, inputs, labels, plain, one, rows, 1 if options.toy else 3)
    with rows.trying(f"{network.name}, compensated"):
        made_up = compensated(network, inputs[:1000], labels[:1000], rows, options)
        for name, racing in (("exhaustive", False), ("racing", True)):
            what = f"{network.name}, compensated, {name}"
            timed(network, made_up, inputs, labels, plain, rows, options, what, racing=racing)


def fastest(network: Prepared, images: torch.Tensor, rows: Rows, options: argparse.Namespace) -> Plain:
    """The plain network in float32, as the search computes, and in TF32."""
    sizes = (4, 8) if options.toy else (64, 128, 250, 500)
    model = copy.deepcopy(network.model).to(images.device)
    for precision in ("tf32", "float32"):
        with computing_in(precision):  # type: ignore[arg-type]
            batch_size, memory_format = reference.fastest(model, images, sizes)
            formatted = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
            rate = reference.throughput(formatted, images[:batch_size].contiguous(memory_format=memory_format))
        figures = {"images a second": rate, "batch": batch_size, "format": str(memory_format).removeprefix("torch.")}
        rows.add(f"{network.name}, plain forward passes, {precision}", figures)
    return Plain(rate, batch_size, memory_format)


def images_that_fit(
    network: Prepared, proposals: Sequence[Proposal], images: torch.Tensor, labels: torch.Tensor, seconds: float
) -> int:
    """So many images that an exhaustive iteration takes about `seconds`: whole batches, judged by a first one."""
    first = min(250, len(images))
    search.iteration(copy.deepcopy(network.model), spread(proposals, 4), images[:first], labels[:first], racing=False)
    found = search.iteration(copy.deepcopy(network.model), proposals, images[:first], labels[:first], racing=False)
    return min(len(images), first * max(1, int(seconds / found.seconds)))


def timed(
    network: Prepared,
    proposals: Sequence[Proposal],
    images: torch.Tensor,
    labels: torch.Tensor,
    plain: Plain,
    rows: Rows,
    options: argparse.Namespace,
    what: str,
    *,
    racing: bool,
) -> float:
    """One iteration as a row. Returns its seconds."""
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
    found = search.iteration(copy.deepcopy(network.model), proposals, images, labels, racing=racing)
    efficiency = found.image_forwards / found.seconds / plain.rate
    figures = {
        "seconds": found.seconds,
        "candidates": len(proposals),
        "images": len(images),
        "forwards a second": found.image_forwards / found.seconds,
        "of plain": efficiency,
    }
    if on_gpu:
        figures["memory GB"] = (torch.cuda.max_memory_allocated() - there) / 1e9
    rows.add(what, figures, None if options.toy or racing else efficiency >= AIM)
    return found.seconds


def together(
    network: Prepared, tasks: Sequence[object], images: torch.Tensor, labels: torch.Tensor, rows: Rows
) -> None:
    """Branches one by one against several together, on the same tasks and images."""
    seconds = {}
    for name, made in (("one by one", OneByOne), ("together", Together), ("as the engine does", Engine)):
        calibration = CalibrationSet(images, labels, 250)
        engine = made(*ready_with(copy.deepcopy(network.model), calibration))
        for _ in range(2):  # the first is a warm-up
            reference.synchronise(images)
            began = time.perf_counter()
            engine.losses(tasks, np.arange(len(images)))  # type: ignore[arg-type]
            seconds[name] = time.perf_counter() - began
    figures = {f"{name}, s": value for name, value in seconds.items()}
    rows.add(f"{network.name}, branches", {"tasks": len(tasks), "images": len(images)} | figures)


def beside_reference(
    network: Prepared,
    images: torch.Tensor,
    labels: torch.Tensor,
    plain: Plain,
    ours_s: float,
    rows: Rows,
    candidates: int,
) -> None:
    """The authors' procedure on a few candidates, scaled to all proposals."""
    model = copy.deepcopy(network.model).to(images.device)
    all_picks = sum(1 + len(proposal.candidate.also) for proposal in network.proposals)
    formatted = images.contiguous(memory_format=plain.memory_format)
    taken = []
    for proposal in spread(network.proposals, candidates):
        layer, filters = proposal.candidate.layer, proposal.candidate.filters
        sizes = {"batch_size": plain.batch_size, "memory_format": plain.memory_format}
        with computing_in("float32"):
            one = reference.measure(model, layer, filters, formatted, labels, **sizes)  # type: ignore[arg-type]
        taken.append(one.pruning_s + one.forward_s)
    whole = all_picks * sum(taken) / len(taken)
    figures = {"timed on": len(taken), "images": len(images), "all, scaled, s": whole, "to ours": whole / ours_s}
    rows.add(f"{network.name}, the reference procedure", figures)


def compensated(
    network: Prepared, images: torch.Tensor, labels: torch.Tensor, rows: Rows, options: argparse.Namespace
) -> list[Proposal]:
    """The proposals with what makes up for them, and the seconds of that."""
    began = time.monotonic()
    given = Prepared(network.name, network.model, images, labels, network.graph, network.proposals)
    compensator = compensator_on(given, images.device)
    between = time.monotonic()
    config, example = LaaspConfig(flops_reduction=0.5, compensate="full"), torch.zeros(1, *images.shape[1:])
    macs = count_macs(network.model, example)
    base = measure_baseline(network.graph, macs, config)
    made = propose(network.model, network.graph, macs, base, config, made_up=compensator.made_up)
    figures = {"moments s": between - began, "coefficients s": time.monotonic() - between}
    rows.add(f"{network.name}, what compensation prepares", figures)
    return spread(made, 6) if options.toy else made
