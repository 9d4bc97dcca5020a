"""Says what a run is doing: python jobs/status.py RUN [--watch], or lists all: --storage DIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.main import status

if __name__ == "__main__":
    sys.exit(status())
