"""`laasp-ray export` and `jobs/export.py`: the network of a run that is over, for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from laasp_ray.cli.stopping import guarded
from laasp_ray.run.exporting import export_run


def export(arguments: Sequence[str] | None = None, prog: str = "export.py") -> int:
    """`laasp-ray export` and `jobs/export.py RUN`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Exports the network of a finished run, and checks the file against torch.",
    )
    parser.add_argument("run", help="the run's folder, or its s3:// or gs:// address")
    parser.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx makes pruned/model.onnx, torch pruned/model.pt2 of torch.export (default onnx)",
    )
    parser.add_argument("--trust", action="store_true", help="run the builder that the folder names")

    def run() -> None:
        options = parser.parse_args(arguments)
        made = export_run(options.run, options.format, trust=options.trust)
        print(made.text)
        print(f"{made.bytes:,} bytes in {made.seconds:.1f} s, for any number of images a batch")

    return guarded(run, stopped="stopped; nothing of the run has changed, or the file is complete")
