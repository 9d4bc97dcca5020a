"""The model card of a finished network: what it is, how it was made, its numbers, how to load it. Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from laasp_ray.config import FilterPruneConfig, GroupSparsityConfig, LaaspConfig, RunConfig
from laasp_ray.config.data import GIVEN
from laasp_ray.config.names import is_import_path
from laasp_ray.export.latency import EngineLatency
from laasp_ray.export.network import INPUT, OUTPUT, Export
from laasp_ray.models.libraries import OPTIONAL
from laasp_ray.records import Metrics
from laasp_ray.run.events import RunFinished
from laasp_ray.run.finishing import Delivered
from laasp_ray.run.metrics import form_of, label_of, noun_of

CARD = "model_card.md"
_ONNX = f'''import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(["{OUTPUT}"], {{"{INPUT}": images.astype(numpy.float32)}})[0]'''
_TORCH = """import torch
network = torch.export.load("model.pt2").module()
outputs = network(images)"""
_LIBRARIES = ("torchvision", *OPTIONAL)
"""The packages that builders are named after, `timm.NAME`; other builders are this package's own."""


def model_card(config: RunConfig, summary: RunFinished, before: Metrics | None, made: Delivered) -> str:
    """The card as text. `before` are the test metrics before the first prune, if there were any."""
    kind = "Pruned" if config.prunes else "Trained"
    parts = [
        f"# {config.name}",
        f"{kind} `{config.model.builder}`, made by laasp_ray.",
        "## What it is",
        *_what(config),
        "## How it was made",
        *_how(config, summary),
        "## Numbers",
        *_numbers(config, summary, before),
        *_latency(made.latency),
        "## How to load it",
        *_loading(config, made.exports),
    ]
    return "\n\n".join(parts) + "\n"


def _what(config: RunConfig) -> Iterator[str]:
    data, noun = config.data, noun_of(config.data.factory)
    shape = f"({noun}, {', '.join(map(str, config.model.input_shape))})"
    facts = {"network": f"`{config.model.builder}`, arguments: {_arguments(config.model.arguments)}"}
    if data.factory:
        facts["input"] = f"{shape}, as the run's own data set gives them"
    else:
        facts["input"] = (
            f"float32, {shape}; each pixel, in 0 to 1, less the mean {_listed(data.mean)} and divided by "
            f"{_listed(data.std)}, by channel"
        )
        resized = f"the shorter side resized to {data.eval_resize}, the centre cropped"
        facts["before that"] = resized if data.eval_resize else "no resizing"
    facts["output"] = (
        "as the network gives it, for the loss below" if config.train.loss else f"logits, ({noun}, classes)"
    )
    yield _bullets(facts)


def _how(config: RunConfig, summary: RunFinished) -> Iterator[str]:
    prune, train = config.prune, config.train
    facts = {"method": f"`{prune.method}`" if config.prunes else "training alone"}
    if targets := prune.targets:
        facts["target"] = ", ".join(f"{share:.2%} of {of} gone" for of, share in targets.items())
    if isinstance(prune, LaaspConfig) and config.prunes:
        facts["criteria"] = ", ".join(prune.criteria)
    if isinstance(prune, FilterPruneConfig) and config.prunes:
        facts["compensation"] = prune.compensate
    if isinstance(prune, GroupSparsityConfig) and config.prunes:
        facts["sparsity"] = f"{prune.pruned_per_group} of {prune.group} weights in each group are zero"
    facts["schedule"] = f"{train.epochs} epochs, pruning at epoch {train.prune_epoch}"
    facts["start"] = "given weights" if train.pretrained else "from scratch"
    facts["data"] = _data(config)
    facts["loss"] = _own(config.train.loss) or "cross-entropy"
    if summary.metrics.named:
        facts["metrics"] = _metrics(summary.metrics)
    facts["seed"] = str(config.seed)
    facts["time"] = f"{summary.seconds:,.0f} s of epochs, iterations and evaluations"
    yield _bullets(facts)
    yield "`plan.json` has the channels that every layer kept. The run's folder has its whole config and journal."


def _numbers(config: RunConfig, summary: RunFinished, before: Metrics | None) -> Iterator[str]:
    after = summary.metrics
    rows: list[tuple[str, ...]] = [
        ("", "unpruned", "this network"),
        ("multiply-accumulates", f"{summary.macs_unpruned:,}", f"{summary.macs:,}"),
        ("parameters", f"{summary.parameters_unpruned:,}", f"{summary.parameters:,}"),
        *(_row(name, before, value) for name, value in after.named.items()),
        ("loss", f"{before.loss:.4f}" if before else "-", f"{after.loss:.4f}"),
    ]
    yield _table(rows)
    yield (
        f"Metrics and loss are on {after.images:,} test {noun_of(config.data.factory)}; the unpruned network's are of "
        f"just before the first prune. {summary.flops_reduction:.2%} of FLOPs are gone ({summary.macs_convention})."
    )


def _row(name: str, before: Metrics | None, after: float) -> tuple[str, str, str]:
    """The row of a metric."""
    form = form_of(name)
    value = None if before is None else before.named.get(name)
    return label_of(name), "-" if value is None else form.format(value), form.format(after)


def _data(config: RunConfig) -> str:
    data = config.data
    if not data.factory:
        return f"`{data.format}`"
    if data.factory == GIVEN:
        return _own(GIVEN)
    collate = f", collated by {_own(data.collate)}" if data.collate else ""
    return f"{_own(data.factory)}, arguments: {_arguments(data.arguments)}{collate}"


def _metrics(metrics: Metrics) -> str:
    """The metrics by name, the primary one first."""
    named = ", ".join(map(label_of, metrics.named))
    return f"{named}; of {label_of(metrics.primary[0])}, the primary one, {metrics.better} is better"


def _own(path: str) -> str:
    """A part of the user's own as the config names it; empty if there is none."""
    return "a Python object that the run was given" if path == GIVEN else f"`{path}`" if path else ""


def _arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"


def _latency(rows: tuple[EngineLatency, ...]) -> Iterator[str]:
    if not rows:
        return
    cells: list[tuple[str, ...]] = [("latency, median ms", "batch", "unpruned", "this network")]
    for row in rows:
        pair = [f"{one.median_ms:.2f}" if one else "-" for one in (row.unpruned, row.pruned)]
        cells.append((row.engine, str(row.batch_size), *pair))
    yield _table(cells)
    places = sorted({f"{row.pruned.device}, {row.pruned.threads} threads" for row in rows if row.pruned})
    notes = [f"- {row.engine} at batch {row.batch_size}: {row.note}" for row in rows if row.note]
    yield "\n".join([f"Measured by turns on {'; '.join(places) or 'nothing'}.", *(["", *notes] if notes else [])])


def _loading(config: RunConfig, exports: tuple[Export, ...]) -> Iterator[str]:
    own = is_import_path(config.model.builder)
    call = 'load_pruned("FOLDER", model=YOUR_UNPRUNED_NETWORK)' if own else 'load_pruned("FOLDER")'
    library = config.model.builder.partition(".")[0]
    package = "the builder's own package" if own else library if library in _LIBRARIES else "nothing else"
    needs = f"torch, safetensors and {package}"
    yield f"With laasp_ray (it needs {needs}); `FOLDER` is the folder of this file:"
    yield _code(f"from laasp_ray import load_pruned\nnetwork = {call}  # an nn.Module on the CPU, in eval mode")
    for export in exports:
        yield export.text + "."
        if export.file:
            yield _code(_ONNX if export.format == "onnx" else _TORCH)


def _bullets(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def _listed(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
