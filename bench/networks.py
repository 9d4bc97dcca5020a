"""How many layers of torchvision's and timm's networks can be pruned, and whether candidates' losses are exact.

    python bench/networks.py                    # measures what is not in the results yet, prints the table
    python bench/networks.py --names timm.vit_tiny_patch16_224 --again
    python bench/networks.py --write docs/networks.md

Each network runs in a process of its own, with random weights at which every channel matters (scramble), one thread
and a limit of time. All convolutions and linear layers are candidates but those that give the network's outputs. A
sample of candidates, one or several filters each, is measured by the search, one at a time, and on physically pruned
copies. Results are kept as JSON lines, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine import machine
from network_list import NETWORKS, Network

RESULTS = Path(__file__).parent / "results" / "networks.jsonl"
OUTPUTS = "its filters are outputs of the network"
IMAGES, SAMPLE = 3, 6
_PRELOADED = ["torch", "torchvision", "timm", "laasp_ray.models", "laasp_ray.cost.macs", "laasp_ray.search.engine"]
_PRELOADED += ["laasp_ray.search.candidates", "laasp_ray.pruning.graph"]
_MARK = "<!-- table -->"
_HEAD = ("network", "image", "layers", "prunable", "masked", "copied", "refused", "effect", "difference", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="", help="comma-separated, as in network_list.py (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--again", action="store_true", help="measure networks again that have a result")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one network (default 600)")
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"candidates of a network (default {SAMPLE})")
    parser.add_argument("--write", type=Path, help="write the table into this page, below its mark")
    options = parser.parse_args()
    wanted = [network for network in NETWORKS if not options.names or network.name in options.names.split(",")]
    rows = read(options.results)
    if not options.write:
        for network in wanted:
            if options.again or network.name not in rows:
                rows[network.name] = in_process(network, options.seconds, options.sample)
                append(options.results, rows[network.name])
                print(json.dumps(rows[network.name]), file=sys.stderr, flush=True)
    lines = page_lines([rows[network.name] for network in NETWORKS if network.name in rows])
    if options.write:
        head = options.write.read_text().partition(_MARK)[0]
        options.write.write_text(head + _MARK + "\n\n" + "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
        print(machine("timm"))


def in_process(network: Network, seconds: float, sample: int) -> dict[str, Any]:
    """The row of a network, measured in another process; its `error` if that fails or takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # imports take longer than most networks
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_measure, args=(network, sample, theirs))
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(seconds) else {"error": f"not done in {seconds:g} s"}
    except EOFError:
        process.join()
        row = {"error": f"its process ended with status {process.exitcode}"}
    process.kill()
    process.join()
    found = {"network": network.name, "side": network.side, **row}
    return found if "error" in found else {**found, "seconds": round(time.perf_counter() - started, 1)}


def _measure(network: Network, sample: int, pipe: Connection) -> None:
    try:
        row = measure(network, sample)
    except Exception as error:  # a network's own code may raise any error, which is its row
        row = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    pipe.send(row)


def measure(network: Network, sample: int) -> dict[str, Any]:
    """The row of a network. Losses are of single images; `difference` is the largest, relative to the copy's loss."""
    import numpy as np
    import torch
    from torch import nn

    from laasp_ray.config import LaaspConfig, ModelConfig
    from laasp_ray.cost.macs import count_macs
    from laasp_ray.models import build
    from laasp_ray.pruning.graph import PruningGraph
    from laasp_ray.pruning.plan import Plan
    from laasp_ray.pruning.verify import scramble
    from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
    from laasp_ray.search.engine import Engine
    from laasp_ray.search.evaluate import CalibrationSet, ready_with

    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = {"num_classes": 10, **network.arguments}
    model = build(ModelConfig(builder=network.name, arguments=arguments)).eval()
    images = torch.randn(IMAGES, 3, network.side, network.side, generator=torch.Generator().manual_seed(0))
    scramble(model, images)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    graph = PruningGraph(model, images, extra_layers=linear)
    refused = Counter(kind_of(reason) for reason in graph.skipped.values() if reason != OUTPUTS)
    macs, config = count_macs(model, images), LaaspConfig(flops_reduction=0.5, criteria=("l1",))
    labels = torch.arange(IMAGES)
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(graph.layers) + sum(refused.values()),
        "prunable": len(graph.layers),
        "refused": dict(refused.most_common()),
    }
    if not graph.layers:
        return {**row, "masked": 0, "copied": {}, "sample": 0, "sample_masked": 0, "difference": 0.0}
    proposals = propose(model, graph, macs, measure_baseline(graph, macs, config), config)
    tasks = tasks_of(proposals)[:-1]
    model, calibration = ready_with(model, CalibrationSet(images, labels, IMAGES))
    engine = Engine(model, calibration)
    copied = [engine.branch_points.cost(task).copied for task in tasks]
    of_layer = {proposal.candidate.layer: reason for proposal, reason in zip(proposals, copied, strict=True)}
    for proposal in proposals:  # layers that share their channels made one candidate
        of_layer |= {layer: of_layer[proposal.candidate.layer] for layer, _ in proposal.candidate.also}
    named = Counter(kind_of(reason) for reason in of_layer.values() if reason)
    chosen = np.unique(np.linspace(0, len(tasks) - 1, sample).round().astype(int)).tolist()
    whole = losses_of_copy(model, Plan.empty(), calibration.at(np.arange(IMAGES)))
    largest = effect = 0.0
    for position in chosen:
        losses = engine.losses([tasks[position]], np.arange(IMAGES))
        if losses.errors:
            raise RuntimeError(losses.errors[0])
        of_copy = losses_of_copy(model, tasks[position].step, calibration.at(np.arange(IMAGES)))
        effect = max(effect, float((np.abs(of_copy - whole) / np.abs(whole)).max()))
        largest = max(largest, float((np.abs(losses.values[0] - of_copy) / np.abs(of_copy)).max()))
    return {
        **row,
        "masked": sum(not reason for reason in of_layer.values()),
        "copied": dict(named.most_common()),
        "without_candidate": len(graph.layers) - len(of_layer),
        "candidates": len(tasks),
        "sample": len(chosen),
        "sample_masked": sum(not copied[position] for position in chosen),
        "difference": largest,
        "effect": effect,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def losses_of_copy(model: Any, step: Any, batch: tuple[Any, Any]) -> Any:
    """Losses (n,) of the images of a physically pruned copy."""
    import torch
    from torch.nn import functional

    from laasp_ray.pruning.plan import apply_plan
    from laasp_ray.pruning.verify import clone_sharing_parameters
    from laasp_ray.search.precision import full_precision

    pruned = clone_sharing_parameters(model)
    apply_plan(pruned, step)
    with torch.inference_mode(), full_precision():
        return functional.cross_entropy(pruned(batch[0]).float(), batch[1], reduction="none").numpy()


def kind_of(reason: str) -> str:
    """A reason without the names and numbers of one layer."""
    reason = re.sub(r" \(.*", "", reason)
    reason = re.sub(r" in [\w.]+", "", reason)
    reason = re.sub(r"^[\w.]+ (normalises|is not called|takes|changes)", r"a module \1", reason)
    reason = re.sub(r"(inputs|filters|channels) of [\w.]+", r"\1 of a layer", reason)
    return re.sub(r"\d+", "N", reason)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each network."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def page_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table and the reasons that it refers to by letters, as Markdown."""
    measured = [row for row in rows if "error" not in row]
    counts = Counter[str]()
    for row in measured:
        counts.update(row["refused"])
        counts.update(row["copied"])
    letters = {reason: f"r{number}" for number, (reason, _) in enumerate(counts.most_common(), 1)}
    lines = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | {row['side']} | {row['error']} |" + " |" * (len(_HEAD) - 3))
            continue
        cells = [
            row["network"],
            row["side"],
            row["layers"],
            row["prunable"],
            row["masked"],
            _counted(row["copied"], letters),
            _counted(row["refused"], letters),
            f"{row['effect']:.0e}" if "effect" in row else "",
            f"{row['difference']:.0e}" if row["sample"] else "",
            f"{row['sample']} ({row['sample_masked']})",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = [sum(row[key] for row in measured) for key in ("layers", "prunable", "masked", "sample", "sample_masked")]
    exact = [row for row in measured if row["difference"] <= 1e-4]
    lines += [
        "",
        f"{len(measured)} networks: {total[1]:,} of {total[0]:,} layers can be pruned, {total[2]:,} of these by masks. "
        f"Of {total[3]} candidates measured,",
        f"{total[4]} by masks, the losses are those of pruned copies: within 1e-4 for {len(exact)} of "
        f"{len(measured)} networks, at most {max(row['difference'] for row in measured):.0e}.",
        "",
        "Reasons:",
        "",
        *(f"- {letters[reason]} ({count} layers): {reason}" for reason, count in counts.most_common()),
    ]
    return lines


def _counted(reasons: Mapping[str, int], letters: Mapping[str, str]) -> str:
    return ", ".join(f"{count} {letters[reason]}" for reason, count in reasons.items()) or "0"


if __name__ == "__main__":
    main()
