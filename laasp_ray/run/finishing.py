"""What a run makes of its finished network beside the weights: the export, the latencies, the model card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.export.graph import planned_convolutions
from laasp_ray.export.latency import EngineLatency, measure_engines
from laasp_ray.export.network import Export, export_network, failed
from laasp_ray.models.device import this_device
from laasp_ray.pruning.plan import Plan
from laasp_ray.run.events import LatencyMeasured, NetworkExported, PhaseStarted, RunEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delivered:
    """`files` are for the folder `pruned/`."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    exports: tuple[Export, ...] = ()
    latency: tuple[EngineLatency, ...] = ()


def deliver(
    config: RunConfig,
    unpruned: nn.Module,
    network: nn.Module,
    plan: Plan,
    *,
    record: Callable[[RunEvent], None],
    notify: Callable[[PhaseStarted], None],
) -> Delivered:
    """Exports the finished network and times it beside the unpruned one, as `config.export` says.

    A run does not fail here: what cannot be done is in the events, with its reason.
    """
    settings = config.export
    shape = config.model.input_shape
    files: dict[str, bytes] = {}
    exports: tuple[Export, ...] = ()
    if settings.format != "none":
        wanted: Literal["onnx", "torch"] = "torch" if settings.format == "torch" else "onnx"
        notify(PhaseStarted(phase="export", detail=f"the finished network as {wanted}"))
        try:
            made = export_network(network, shape, planned_convolutions(unpruned, plan), wanted)
            files[made.record.file], exports = made.content, (made.record,)
        except Exception as error:
            logger.debug("the export failed", exc_info=True)
            exports = (failed(wanted, error),)
        record(NetworkExported(export=exports[0]))
    latency: Sequence[EngineLatency] = ()
    if settings.latency:
        notify(PhaseStarted(phase="latency", detail=f"both networks in {', '.join(settings.latency)}"))
        device = this_device()
        latency = measure_engines(
            unpruned, network, shape, settings, device, onnx=files.get("model.onnx"), compile_when_busy=False
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()  # trainers share this GPU
        record(LatencyMeasured(rows=tuple(latency)))
    return Delivered(files, exports, tuple(latency))
