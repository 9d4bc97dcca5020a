"""One iteration of the search, ours against the reference procedure (bench/reference.py), on the same cores in one run.

    python bench/search.py [--data DATA] [--json FILE] [--only resnet20 ...] [--threads 2] [--scale 1.0]
                           [--precision float32 bfloat16] [--images 500] [--races-only] [--prunes 2]

DATA is the folder of development data (`checkpoints/`, `cifar10_mini`, `imagenet_sample`); without it images are noise
and weights and BatchNorms random. The reference is timed on a part of its candidates, named in the table, and scaled to
all. Both sides see the same prepared images. `agree` with racing off: the reference's losses of the candidates it was
timed on, our two best among them, are ours to 1e-5, and so is their order; with racing on: the choice is the exhaustive
one. It is null where the two best lie within 1e-5, and with `--races-only`, where the exhaustive search of ours, which
takes ten times as long as a race, is left out. With `--prunes 2` our choice is pruned and all is done again, as the
next iteration of a run would without training in between (search.racing_memory). `efficiency` is in forward passes of
the whole network a second, of those of the plain network at the reference's batch size and memory format, timed in
between. `same_filters`, `shared_prefix` (masked layers and the base run included), `no_copies`, `efficiency` and
`racing_factor` multiply to the ratio with what graph and proposals take. Batched branches are a GPU's; spreading is in
bench/fanout.py.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from machine import machine
from torch import nn

from laasp_ray.config import LaaspConfig, ModelConfig, SearchConfig
from laasp_ray.config.search import Precision
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.models import build, load_weights
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.recipes import recipe
from laasp_ray.search.candidates import Proposal, measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine, Losses
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.executor import SerialBackend
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.schedule import Settings, Unit, measure

TIE = 1e-5


@dataclass(frozen=True)
class Network:
    """`reference_candidates`: on how many the reference is timed; `gpu_images` instead of `images` on a GPU."""

    builder: str
    checkpoint: str
    side: int
    images: int
    gpu_images: int
    batch_sizes: tuple[int, ...]
    reference_candidates: int


NETWORKS = {
    "resnet20": Network("cifar.resnet20", "resnet20_epoch130", 32, 4000, 4000, (64, 125, 250, 500), 10),
    "resnet56": Network("cifar.resnet56", "resnet56_epoch60", 32, 4000, 4000, (64, 125, 250, 500), 6),
    "vgg16": Network("cifar.vgg16", "", 32, 250, 4000, (50, 125, 250), 8),
    "mobilenet_v2": Network("torchvision.mobilenet_v2", "", 224, 32, 1000, (8, 16, 32), 16),
    "resnet50": Network("torchvision.resnet50", "", 224, 16, 1000, (4, 8, 16), 8),
}
COLUMNS = (
    "network",
    "prune",
    "racing",
    "precision",
    "images",
    "proposals",
    "candidates",
    "reference_s",
    "ours_s",
    "ratio",
    "agree",
    "max_relative_difference",
    "image_forwards",
    "efficiency",
    "same_filters",
    "shared_prefix",
    "no_copies",
    "racing_factor",
    "reference_timed_on",
    "reference_of_plain",
    "batch_size",
)


@dataclass(frozen=True)
class IterationResult:
    """One iteration of ours: seconds, forward passes of one image by the whole network that it was worth, losses."""

    seconds: float
    image_forwards: float
    losses: list[float]
    best: int


class CountingHand(SerialBackend):
    """Counts what the units cost, in forward passes of the whole network."""

    def __init__(self, engine: Engine, tasks: Sequence[LossTask]) -> None:
        super().__init__(engine, tasks)
        self._macs, self.image_forwards = engine.branch_points.cost(tasks[-1]).own, 0.0

    def collect(self) -> tuple[Unit, Losses]:
        unit, losses = super().collect()
        costs = [self.cost(task) for task in unit.tasks]
        whole = any(self._tasks[task].unpruned for task in unit.tasks)
        shared = 0 if whole else max(cost.shared for cost in costs)
        self.image_forwards += len(unit.images) * (shared + sum(cost.own for cost in costs)) / self._macs
        return unit, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of development data (default: noise, random weights)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="these networks only")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32"],
        help="of the races, one for each (default float32)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to use (default all)")
    parser.add_argument("--images", type=int, help="this number of images instead")
    parser.add_argument("--prunes", type=int, default=1, help="iterations, one after the other (default 1)")
    parser.add_argument("--races-only", action="store_true", help="leave the exhaustive search out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ran_on = machine("torch-pruning")
    print(ran_on)
    rows: list[dict[str, Any]] = []
    for name in options.only:
        for row in compare(name, options):
            rows.append(row)
            print("; ".join(f"{key} {_shown(row[key])}" for key in COLUMNS), flush=True)
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(_shown(row[key]) for key in COLUMNS) + " |")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": ran_on, "rows": rows}, indent=1) + "\n")
    return 0


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a network: every image, and a race in each precision."""
    network = NETWORKS[name]
    if options.images:
        network = dataclasses.replace(network, images=options.images, gpu_images=options.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, images, labels = load(network, options.data, 1.0 if options.images else options.scale, device)
    batch_size, memory_format = reference.fastest(model, images, network.batch_sizes)
    memories = {precision: RaceMemory() for precision in options.precision}
    rows: list[dict[str, Any]] = []
    for prune in range(1, options.prunes + 1):
        some, step = iteration_rows(model, network, options, images, labels, batch_size, memory_format, memories)
        rows += [{"network": name, "prune": prune, **row} for row in some]
        apply_plan(model, step)
    return rows


def iteration_rows(
    model: nn.Module,
    network: Network,
    options: argparse.Namespace,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    memory_format: torch.memory_format,
    memories: Mapping[Precision, RaceMemory],
) -> tuple[list[dict[str, Any]], Plan]:
    """The rows of one iteration, and the chosen prune."""
    proposals, all_picks, prepare_s = proposals_of(model, network)
    off = None if options.races_only else iteration(model, proposals, images, labels, racing=False)
    runs = [("float32", off)] if off is not None else []
    for precision in options.precision:
        ours = iteration(model, proposals, images, labels, racing=True, precision=precision, memory=memories[precision])
        runs.append((precision, ours))
    measured = runs[0][1].losses
    order = sorted(range(len(proposals)), key=lambda position: (position != runs[0][1].best, measured[position]))
    timed_on = reference_sample(order, network.reference_candidates)
    timed, plain = time_reference(model, [proposals[p] for p in timed_on], images, labels, batch_size, memory_format)
    forward_s = statistics.mean(entry.forward_s for entry in timed)
    reference_s = all_picks * (forward_s + statistics.mean(entry.pruning_s for entry in timed))
    differences = [abs(entry.loss - measured[p]) / abs(entry.loss) for p, entry in zip(timed_on, timed, strict=True)]
    tie = measured[order[1]] - measured[order[0]] <= TIE
    same_order = min(timed, key=lambda entry: entry.loss).loss == timed[timed_on.index(order[0])].loss
    rows = []
    for precision, ours in runs:
        racing, seconds = ours is not off, ours.seconds + prepare_s
        agrees = ours.best == order[0] if racing else same_order and max(differences) <= TIE
        rows.append(
            {
                "racing": racing,
                "precision": precision,
                "images": len(images),
                "proposals": all_picks,
                "candidates": len(proposals),
                "reference_s": reference_s,
                "ours_s": seconds,
                "ratio": reference_s / seconds,
                "agree": None if tie or off is None else agrees,
                "max_relative_difference": None if off is None else max(differences),
                "image_forwards": ours.image_forwards / (all_picks * len(images)),
                "efficiency": ours.image_forwards / ours.seconds / plain,
                "same_filters": all_picks / len(proposals),
                "shared_prefix": None if off is None else len(proposals) * len(images) / off.image_forwards,
                "no_copies": reference_s / (all_picks * forward_s),
                "racing_factor": None if off is None else off.seconds / ours.seconds,
                "reference_timed_on": len(timed),
                "reference_of_plain": len(images) / forward_s / plain,
                "batch_size": batch_size,
            }
        )
    return rows, proposals[runs[0][1].best].step


def time_reference(
    model: nn.Module,
    proposals: Sequence[Proposal],
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    memory_format: torch.memory_format,
) -> tuple[list[reference.Timed], float]:
    """The reference on these candidates, and the images a second of the plain network, in turns with it: so both meet
    the same machine."""
    formatted = images.contiguous(memory_format=memory_format)
    plain = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    timed, plain_s = [], []
    for proposal in proposals:
        layer, filters = proposal.candidate.layer, proposal.candidate.filters
        timed.append(
            reference.measure(
                model, layer, filters, formatted, labels, batch_size=batch_size, memory_format=memory_format
            )
        )
        plain_s.append(reference.seconds_of(plain, formatted, labels, batch_size))
    return timed, len(images) / statistics.mean(plain_s)


def iteration(
    model: nn.Module,
    proposals: Sequence[Proposal],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    racing: bool,
    precision: Precision = "float32",
    memory: RaceMemory | None = None,
) -> IterationResult:
    """Ours, in this process and at the recipes' batch size; the time includes tracing the network."""
    batch_size = SearchConfig().batch_size
    network = ready(model, images.device)
    tasks = tasks_of(proposals)
    reference.synchronise(images)
    started = time.perf_counter()
    backend = CountingHand(Engine(network, CalibrationSet(images, labels, batch_size), precision=precision), tasks)
    settings = Settings(len(images), batch_size, racing=racing, fast=precision == "bfloat16")
    results = measure(backend, len(tasks), settings, lambda position, result: None, memory=memory)
    seconds = time.perf_counter() - started
    left = [p for p in range(len(proposals)) if results[p].dropped_at is None]
    losses = [result.loss for result in results[:-1]]
    return IterationResult(seconds, backend.image_forwards, losses, min(left, key=lambda p: losses[p]))


def proposals_of(model: nn.Module, network: Network) -> tuple[list[Proposal], int, float]:
    """Ours, how many the reference has, and the seconds of our graph and proposing (it is built once per iteration)."""
    started = time.perf_counter()
    example = torch.zeros(1, 3, network.side, network.side)
    on_cpu = model.cpu() if next(model.parameters()).is_cuda else model
    graph, macs = PruningGraph(on_cpu, example), count_macs(on_cpu, example)
    config = LaaspConfig(flops_reduction=0.5)
    proposals = propose(on_cpu, graph, macs, measure_baseline(graph, macs, config), config)
    return proposals, sum(1 + len(p.candidate.also) for p in proposals), time.perf_counter() - started


def reference_sample(order: Sequence[int], count: int) -> list[int]:
    """The two best of ours, and others spread evenly over the layers."""
    best = list(order[:2])
    rest = sorted(set(order) - set(best))
    spread = [rest[i] for i in np.linspace(0, len(rest) - 1, min(count - 2, len(rest))).round().astype(int)]
    return best + spread


def load(
    network: Network, data: Path | None, scale: float, device: torch.device
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network in eval mode and its images, prepared (n, 3, side, side)."""
    classes = 10 if network.side == 32 else 1000
    torch.manual_seed(0)
    arguments = {"num_classes": classes}
    model = build(
        ModelConfig(builder=network.builder, arguments=arguments, input_shape=(3, network.side, network.side))
    )
    count = max(2, round((network.gpu_images if device.type == "cuda" else network.images) * scale))
    images, labels = load_images(network, data, count)
    if data is not None and network.checkpoint:
        load_weights(model, data / "checkpoints" / f"{network.checkpoint}.safetensors")
    else:
        randomise(model, images[:8])
    return model.eval().to(device), images.to(device), labels.to(device)


def load_images(network: Network, data: Path | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, network.side, network.side, generator=generator)
        return images, torch.arange(count) % 10
    config = recipe("resnet20_cifar10" if network.side == 32 else "resnet50_imagenet").data
    with tempfile.TemporaryDirectory() as folder:
        path = data / "cifar10_mini"
        if network.side != 32:  # class folders without the train/ above them
            path = Path(folder)
            (path / "train").symlink_to((data / "imagenet_sample").resolve())
        config = dataclasses.replace(config, path=str(path))
        calibration = draw_calibration_images(open_source(config, "train"), config, images=count, seed=0)
    return normalise(calibration.images, config), calibration.labels


@torch.no_grad()
def randomise(model: nn.Module, images: torch.Tensor) -> None:
    """Random affine values, and statistics as the network has them on `images`: every prune changes something."""
    generator = torch.Generator().manual_seed(0)

    def set_statistics(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        dimensions = [0, *range(2, inputs[0].ndim)]
        norm.running_mean = inputs[0].mean(dimensions)
        norm.running_var = inputs[0].var(dimensions) + 1e-3
        norm.weight.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr, operator]
        norm.bias.uniform_(-0.5, 0.5, generator=generator)  # type: ignore[union-attr, operator]

    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    model(images)
    for hook in hooks:
        hook.remove()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "null" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
