"""Prunes torchvision's ResNet-50: on the embedded digits, or with --data on ImageNet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted job finds the package beside this folder

from laasp_ray.cli.main import prune_resnet50

if __name__ == "__main__":
    sys.exit(prune_resnet50())
