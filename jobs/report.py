"""Writes a page about a run or a sweep: python jobs/report.py RUN [RUN ...] [--out FILE]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.report import report

if __name__ == "__main__":
    sys.exit(report())
