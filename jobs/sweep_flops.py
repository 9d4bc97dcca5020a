"""Prunes to several targets, or within a drop: python jobs/sweep_flops.py RECIPE --flops-reduction 0.3 0.42 0.54."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.sweep import sweep

if __name__ == "__main__":
    sys.exit(sweep())
