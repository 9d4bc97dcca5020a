"""Prunes a network by a recipe: python jobs/prune.py RECIPE --data PATH."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.main import prune

if __name__ == "__main__":
    sys.exit(prune())
