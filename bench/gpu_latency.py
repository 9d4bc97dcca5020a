"""bench/gpu.py, latency: ResNet-50 pruned and unpruned, eager, compiled and in ONNX Runtime."""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_packages
import torch
from gpu_networks import Prepared, device_of, large, prepared
from gpu_results import Rows
from reference import synchronise
from timing import alternated
from torch import nn

from laasp_ray import criteria
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.joint import independent_layers, joint_removal
from laasp_ray.pruning.plan import apply_plan

SHARE = 3 / 8
"""The share of filters that each layer inside a block loses: what is left are multiples of 8."""


def latencies(options: argparse.Namespace, rows: Rows) -> None:
    device, side = device_of(options), 32 if options.toy else 224
    network = prepared(options, large(options), side=side, images=2)
    pruned = pruned_by_share(network)
    example = torch.zeros(1, 3, side, side)
    before, after = (count_macs(model, example).total for model in (network.model, pruned))
    rows.add(f"{network.name}, pruned for this", {"FLOPs reduction": 1 - after / before})
    pair = [copy.deepcopy(model).to(device).eval() for model in (network.model, pruned)]
    batches = (1, 4) if options.toy else (1, 64)
    inputs = {batch: torch.randn(batch, 3, side, side, device=device) for batch in batches}
    for dtype, name in ((torch.float32, "float32, torch's defaults"), (torch.bfloat16, "bfloat16, channels last")):
        if options.toy and dtype == torch.bfloat16:
            continue
        for batch, images in inputs.items():
            with rows.trying(f"eager, {name}, batch {batch}"):
                add(rows, f"eager, {name}, batch {batch}", *eager(pair, images, dtype))
    for batch, images in reversed(inputs.items()):
        with rows.trying(f"compiled, float32, batch {batch}"), torch.inference_mode():
            made = [torch.compile(model, dynamic=False) for model in pair]
            add(rows, f"compiled, float32, batch {batch}", *by_turns(made, images))
        with rows.trying(f"ONNX Runtime, batch {batch}"):
            onnx_runtime(options, rows, pair, images, batch)


def pruned_by_share(network: Prepared) -> nn.Module:
    """A copy without the filters of lowest norm of every layer whose filters no other layer shares."""
    pruned, chosen = copy.deepcopy(network.model), {}
    for layer in independent_layers(network.graph):
        scores = criteria.scores("l1", network.model.get_submodule(layer))
        count = int(SHARE * len(scores)) // network.graph.layers[layer].blocks * network.graph.layers[layer].blocks
        chosen[layer] = sorted(scores.argsort()[:count].tolist())
    apply_plan(pruned, plan_of(joint_removal(network.graph, chosen)))
    return pruned


def eager(pair: Sequence[nn.Module], images: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    last = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    models = [copy.deepcopy(model).to(dtype=dtype, memory_format=last) for model in pair]  # type: ignore[call-overload]
    with torch.inference_mode():
        return by_turns(models, images.to(dtype).contiguous(memory_format=last))


def by_turns(models: Sequence[Callable[..., Any]], images: torch.Tensor) -> tuple[float, float]:
    works = [functools.partial(model, images) for model in models]
    repeats = 30 if images.is_cuda else 3
    first, second = alternated(works, functools.partial(synchronise, images), repeats, warmup=3)
    return first, second


def add(rows: Rows, what: str, unpruned_s: float, pruned_s: float, **more: object) -> None:
    figures = {"unpruned ms": 1000 * unpruned_s, "pruned ms": 1000 * pruned_s, "speed-up": unpruned_s / pruned_s}
    rows.add(what, figures | more)


def onnx_runtime(
    options: argparse.Namespace, rows: Rows, pair: Sequence[nn.Module], images: torch.Tensor, batch: int
) -> None:
    """Both networks exported and run there; on the GPU if this ONNX Runtime can, and the row says which."""
    lacking = gpu_packages.missing(["onnx", "onnxscript", "onnxruntime"])
    if lacking:
        rows.add(f"ONNX Runtime, batch {batch}", {"left out": f"missing packages: {', '.join(lacking)}"})
        return
    import onnxruntime

    known = onnxruntime.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
    if options.toy:
        wanted = ["CPUExecutionProvider"]
    on_cpu = images.cpu()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        works, providers, differences = [], set[str](), []
        for number, model in enumerate(pair):
            file = Path(folder) / f"{number}.onnx"
            model = copy.deepcopy(model).cpu()
            torch.onnx.export(model, (on_cpu,), str(file), input_names=["images"], dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(str(file), providers=wanted)
            providers.add(session.get_providers()[0])
            works.append(functools.partial(session.run, None, {"images": on_cpu.numpy()}))
            with torch.inference_mode():
                expected = model(on_cpu)
            found = torch.from_numpy(works[-1]()[0])
            differences.append(float((found - expected).abs().max() / expected.abs().max()))
        times = alternated(works, lambda: None, 3 if options.toy else 10, warmup=1)
    what = f"ONNX Runtime, float32, batch {batch}, copies included"
    add(rows, what, times[0], times[1], provider=", ".join(sorted(providers)), difference=max(differences))
