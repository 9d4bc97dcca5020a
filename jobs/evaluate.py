"""Measures a run's networks: python jobs/evaluate.py FOLDER --data PATH."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.main import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
