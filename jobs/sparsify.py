"""Makes groups of a network's weights sparse: python jobs/sparsify.py RECIPE --data PATH --group 8 --prune 6."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.main import sparsify

if __name__ == "__main__":
    sys.exit(sparsify())
