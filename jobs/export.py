"""Exports the network of a finished run: python jobs/export.py RUN [--format onnx|torch]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.export import export

if __name__ == "__main__":
    sys.exit(export())
