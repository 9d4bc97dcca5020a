"""The networks, images and candidates that the stages of bench/gpu.py measure, and their losses in float64."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import search
import torch
from torch import nn
from torch.nn import functional

from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build, load_weights
from laasp_ray.models.device import this_device
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.search.candidates import Proposal, measure_baseline, propose
from laasp_ray.search.evaluate import LossTask, pruned_copy

CHECKPOINT = "resnet20_epoch130"
LEAST_LOSS = 0.1
STATISTICS = 8
"""Images of which BatchNorms have their statistics. Those of fewer make a network that magnifies rounding."""


@dataclass(frozen=True)
class Prepared:
    """A network in eval mode, on the CPU, its images (n, 3, side, side) and labels, and its first candidates."""

    name: str
    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    graph: PruningGraph
    proposals: list[Proposal]


def prepared(options: argparse.Namespace, builder: str, *, side: int, images: int, weights: bool = True) -> Prepared:
    """ResNet-20 has the authors' weights and CIFAR's images if they are given, else random ones that all matter."""
    torch.manual_seed(0)
    small = builder.startswith("cifar.")
    classes = 10 if small else 1000
    model = build(ModelConfig(builder=builder, arguments={"num_classes": classes}, input_shape=(3, side, side))).eval()
    data = options.data if small and side == 32 else None
    network = search.Network(builder, CHECKPOINT, side, images, images, (images,), 1)
    inputs, labels = search.load_images(network, data, max(images, STATISTICS))
    checkpoint = None if data is None else data / "checkpoints" / f"{CHECKPOINT}.safetensors"
    if weights and builder == "cifar.resnet20" and checkpoint is not None and checkpoint.is_file():
        load_weights(model, checkpoint)
    else:
        search.randomise(model, inputs[:STATISTICS])
        _scale_branches(model)
    example = torch.zeros(1, 3, side, side)
    config = LaaspConfig(flops_reduction=0.5)
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    proposals = propose(model, graph, macs, measure_baseline(graph, macs, config), config)
    return Prepared(builder.partition(".")[2], model, inputs[:images], labels[:images], graph, proposals)


def large(options: argparse.Namespace) -> str:
    """ResNet-50; in a rehearsal a smaller one."""
    return "cifar.resnet32" if options.toy else "torchvision.resnet50"


@torch.no_grad()
def _scale_branches(model: nn.Module) -> None:
    """ConvNeXt begins with branches of 1e-6, so that no prune inside of one would change anything."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.fill_(0.5)


def spread(items: Sequence[Proposal], count: int) -> list[Proposal]:
    """`count` of the proposals, evenly spaced, so that all depths and criteria are among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def of_layers(proposals: Sequence[Proposal], count: int) -> list[Proposal]:
    """All proposals of `count` evenly spaced layers: those of a layer branch off at one place."""
    layers = list(dict.fromkeys(proposal.candidate.layer for proposal in proposals))
    chosen = {layers[i] for i in np.linspace(0, len(layers) - 1, min(count, len(layers))).round().astype(int)}
    return [proposal for proposal in proposals if proposal.candidate.layer in chosen]


@torch.inference_mode()
def precise_losses(
    model: nn.Module, tasks: Sequence[LossTask], images: torch.Tensor, labels: torch.Tensor
) -> np.ndarray:
    """The mean losses (tasks,) of physically pruned copies in float64, on the CPU."""
    doubled = copy.deepcopy(model).double().cpu().eval()
    inputs, found = images.double().cpu(), []
    for task in tasks:
        found.append(float(functional.cross_entropy(pruned_copy(doubled, task)(inputs), labels.cpu())))
    return np.array(found)


def device_of(options: argparse.Namespace) -> torch.device:
    """The stage's device: the GPU, or the CPU of a rehearsal."""
    return torch.device("cpu") if options.toy else torch.device(this_device().type, 0)


def difference_of(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the expected losses, or to LEAST_LOSS: the outputs that a small loss is made of have no more digits
    than others."""
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), LEAST_LOSS)))
