"""The section `export`: what is made of the finished network beside its weights, and what is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from laasp_ray.config.fields import Doc, check, check_types

ExportFormat = Literal["auto", "none", "onnx", "torch"]
Engine = Literal["eager", "compile", "onnxruntime"]
ENGINES: tuple[Engine, ...] = ("eager", "compile", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The file that other programs can run, and the latencies that are measured, when the network is finished.

    Both happen in the driver, and change nothing of the network. These settings may change when a run is resumed.
    """

    format: Annotated[
        ExportFormat,
        Doc(
            "the file beside the weights: onnx (pruned/model.onnx), torch (pruned/model.pt2, of torch.export), none; "
            "auto is onnx where its packages are installed"
        ),
    ] = "auto"
    latency: Annotated[
        tuple[Engine, ...],
        Doc(
            "what times the unpruned and the pruned network at the end of a run: eager, compile, onnxruntime; []: none"
        ),
    ] = ENGINES
    latency_batches: Annotated[tuple[int, ...], Doc("images a batch when that is timed")] = (1, 64)
    latency_seconds: Annotated[float, Doc("seconds that each of these takes at most, after its first three rounds")] = (
        10.0
    )
    compile_seconds: Annotated[
        float,
        Doc("seconds that compile has for both networks and all batches; what would exceed them is not begun"),
    ] = 300.0

    def __post_init__(self) -> None:
        check_types(self, "export.")
        check(len(set(self.latency)) == len(self.latency), "export.latency", self.latency, "different engines")
        check(
            bool(self.latency_batches) and min(self.latency_batches, default=0) >= 1,
            "export.latency_batches",
            self.latency_batches,
            "numbers of at least 1, one or more",
        )
        check(self.latency_seconds > 0, "export.latency_seconds", self.latency_seconds, "above 0")
        check(self.compile_seconds > 0, "export.compile_seconds", self.compile_seconds, "above 0")
