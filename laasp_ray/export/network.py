"""Exports a finished network and checks the file: its convolutions against the plan, its outputs against torch's."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from laasp_ray.errors import ExportError, LaaspError, describe_error
from laasp_ray.export.graph import (
    GraphConvolution,
    called_convolutions,
    check_convolutions,
    convolutions_of_onnx,
    convolutions_of_program,
)
from laasp_ray.export.packages import REMEDY, missing, versions
from laasp_ray.models.copying import deep_copy

FILES: Mapping[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
"""Format -> its file in the folder `pruned/`."""
INPUT, OUTPUT = "images", "logits"
BATCHES = (1, 3)
"""The images of the batches that outputs are compared on: the file is made with two."""
TOLERANCE = 1e-3
"""The largest difference of an output that is allowed, as a share of the largest output."""
_TRACED_BATCH = 2  # torch.export takes a batch of one for a size that never changes
_CHATTY = ("torch.onnx", "torch.export", "torch._dynamo", "torch._export", "onnxscript", "onnx_ir")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What came of an export. Without a `file`, `reason` says why there is none.

    `max_difference` is the largest absolute difference between an output of the file and torch's, over random batches
    of `batches` images; `largest_output` is the largest absolute output there. `convolutions` is the number of
    convolutions of the graph, each with the planned channels. `opset` is ONNX's. `versions`: package -> version.
    """

    format: Literal["onnx", "torch"]
    file: str = ""
    reason: str = ""
    max_difference: float | None = None
    largest_output: float | None = None
    batches: tuple[int, ...] = ()
    convolutions: int | None = None
    opset: int | None = None
    bytes: int | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The export in one sentence."""
        if not self.file:
            return f"Not exported ({self.format}): {self.reason}"
        opset = "" if self.opset is None else f", opset {self.opset}"
        return (
            f"Exported: pruned/{self.file}{opset}, {self.convolutions} convolutions as planned; outputs within "
            f"{self.max_difference:.1e} of torch's, which go up to {self.largest_output:.3g}"
        )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A checked file's content, and what is recorded of it."""

    content: bytes
    record: Export


def export_network(
    network: nn.Module,
    input_shape: Sequence[int],
    planned: Mapping[str, GraphConvolution],
    format: Literal["onnx", "torch"],
) -> Exported:
    """Exports `network` by torch.export, for any number of images a batch, and checks the file.

    A copy is exported, in eval mode on the CPU. `planned` is from `planned_convolutions`. Raises ExportError, with the
    reason, if the network cannot be exported, gives anything but one tensor, a convolution is not as planned, or an
    output differs by more than TOLERANCE.
    """
    try:
        return _exported(network, input_shape, planned, format)
    except ExportError:
        raise
    except Exception as error:  # of many kinds, from the network and from the libraries
        raise ExportError(f"the export failed ({describe_error(error)})") from error


def _exported(
    network: nn.Module,
    input_shape: Sequence[int],
    planned: Mapping[str, GraphConvolution],
    format: Literal["onnx", "torch"],
) -> Exported:
    started = time.perf_counter()
    if format == "onnx" and (absent := missing()):
        raise ExportError(f"ONNX needs {', '.join(absent)}: {REMEDY}")
    model = deep_copy(network).cpu().eval()
    _check_gives_one_tensor(model, input_shape)
    with _quiet(), tempfile.TemporaryDirectory(prefix="laasp_ray-export-") as folder:
        path = Path(folder) / FILES[format]
        program = _traced(model, input_shape)
        found, run, opset = _FORMATS[format](program, path)
        convolutions = check_convolutions(found, planned, called_convolutions(model, _images(input_shape, 1)))
        difference, largest = compare(model, run, input_shape)
        content = path.read_bytes()
    record = Export(
        format=format,
        file=FILES[format],
        max_difference=difference,
        largest_output=largest,
        batches=BATCHES,
        convolutions=convolutions,
        opset=opset,
        bytes=len(content),
        seconds=time.perf_counter() - started,
        versions=versions(),
    )
    return Exported(content=content, record=record)


def onnx_of(network: nn.Module, input_shape: Sequence[int]) -> bytes:
    """The network as ONNX, unchecked: to be timed only. Raises ExportError."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="laasp_ray-export-") as folder:
        path = Path(folder) / FILES["onnx"]
        _write_onnx(_traced(deep_copy(network).cpu().eval(), input_shape), path)
        return path.read_bytes()


def compare(
    model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], input_shape: Sequence[int]
) -> tuple[float, float]:
    """The largest absolute difference between the outputs of `run` and of `model`, and the largest absolute output.

    Raises ExportError if the former is more than TOLERANCE of the latter.
    """
    difference = largest = 0.0
    for batch in BATCHES:
        images = _images(input_shape, batch)
        with torch.inference_mode():
            expected = model(images)
        given = run(images)
        if given.shape != expected.shape:
            raise ExportError(f"the file gives {tuple(given.shape)} for {batch} images, torch {tuple(expected.shape)}")
        if not torch.isfinite(given).all():
            raise ExportError(f"the file gives outputs that are not finite for {batch} random images")
        difference = max(difference, (given - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not difference <= TOLERANCE * largest:
        raise ExportError(
            f"the file computes something else: its outputs differ from torch's by up to {difference:.3g}, more than "
            f"{TOLERANCE:g} of the largest output, {largest:.3g}"
        )
    return difference, largest


def onnx_session(content: bytes | Path, threads: int) -> Any:
    """A session of onnxruntime on the CPU, or on its GPU where it has one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    wanted = [name for name in ("CUDAExecutionProvider",) if name in onnxruntime.get_available_providers()]
    source = content if isinstance(content, bytes) else str(content)
    return onnxruntime.InferenceSession(source, options, providers=[*wanted, "CPUExecutionProvider"])


def _check_gives_one_tensor(model: nn.Module, input_shape: Sequence[int]) -> None:
    with torch.no_grad():  # a network may keep its inputs, and torch.export cannot take those of inference mode
        output = model(_images(input_shape, 1))
    if isinstance(output, torch.Tensor):
        return
    names = list(output) if isinstance(output, Mapping) else getattr(output, "_fields", ())
    listed = ", ".join(map(str, names))
    if not listed and isinstance(output, Sequence):
        listed = f"{len(output)} parts"
    raise ExportError(
        f"the network gives a {type(output).__name__}{f' ({listed})' if listed else ''}; only networks with one tensor "
        "as output are exported"
    )


def _traced(model: nn.Module, input_shape: Sequence[int]) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad():
            return torch.export.export(model, (_images(input_shape, _TRACED_BATCH),), dynamic_shapes=shapes)
    except Exception as error:  # of many kinds, from torch's compiler
        raise ExportError(f"torch.export cannot follow the network ({describe_error(error)})") from error


_Written = tuple[list[GraphConvolution], Callable[[torch.Tensor], torch.Tensor], int | None]


def _onnx(program: torch.export.ExportedProgram, path: Path) -> _Written:
    import onnx

    _write_onnx(program, path)
    session = onnx_session(path, torch.get_num_threads())
    model = onnx.load(path)
    onnx.checker.check_model(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return (
        convolutions_of_onnx(model),
        lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0]),
        opset,
    )


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], external_data=False
        )
        assert made is not None
        made.save(str(path), external_data=False)
    except Exception as error:
        raise ExportError(f"torch.onnx cannot write the network ({describe_error(error)})") from error


def _torch(program: torch.export.ExportedProgram, path: Path) -> _Written:
    try:
        torch.export.save(program, path)
        loaded = torch.export.load(path)
    except Exception as error:
        raise ExportError(f"torch.export cannot save the network ({describe_error(error)})") from error
    run = loaded.module()

    def outputs(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return run(images)

    return convolutions_of_program(loaded), outputs, None


_FORMATS: Mapping[str, Callable[[torch.export.ExportedProgram, Path], _Written]] = {"onnx": _onnx, "torch": _torch}


def _images(input_shape: Sequence[int], batch: int) -> torch.Tensor:
    return torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(batch))


def failed(format: Literal["onnx", "torch"], error: Exception) -> Export:
    """The record of an export that raised `error`."""
    reason = str(error) if isinstance(error, LaaspError) else describe_error(error)
    return Export(format=format, reason=reason, versions=versions())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' progress and warnings from a run's output: what matters is in the error or in the record."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    try:
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
