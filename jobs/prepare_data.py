"""Makes WebDataset shards and checks every image: python jobs/prepare_data.py SOURCE --out FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.prepare_data import prepare_data

if __name__ == "__main__":
    sys.exit(prepare_data())
