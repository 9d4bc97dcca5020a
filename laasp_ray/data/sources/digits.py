"""The embedded data set: 1,797 handwritten digits (digits.md has their origin), as JPEG files in ImageNet's folder
layout."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

FOLDER = "digits-v1"
"""Must change whenever the content of the files changes."""

SIDE = 64
_FILE = Path(__file__).with_name("digits.npz")
_EVERY = 5


def ensure_digits(cache: Path | None = None) -> Path:
    """The folder with `train/<class>/*.JPEG` and `val/<class>/*.JPEG`. It is written if it does not exist yet.

    Every fifth image of each class is in `val` (355 of 1,797), always the same. Images are 64 x 64 RGB JPEG files of
    quality 95, upscaled bicubically from 8 x 8. `cache` is by default $LAASP_RAY_CACHE, else
    $XDG_CACHE_HOME/laasp_ray, else ~/.cache/laasp_ray. Any number of processes may call this at once. Raises DataError
    when the cache cannot be written.
    """
    root = default_cache() if cache is None else cache
    final = root / FOLDER
    if final.is_dir():
        return final
    aside = root / f".{FOLDER}-{uuid.uuid4().hex}"
    try:
        _write(aside)
        _move(aside, final)
    except OSError as error:
        raise DataError(
            f"the digits cannot be written into {root} ({error}); set LAASP_RAY_CACHE to a folder that can"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The images (1797, 8, 8), values from 0 to 16, and their labels (1797,), both uint8."""
    with np.load(_FILE) as content:
        return content["images"], content["labels"]


def default_cache() -> Path:
    """The folder for files that can be made again."""
    chosen = os.environ.get("LAASP_RAY_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "laasp_ray"


def _move(aside: Path, final: Path) -> None:
    try:
        aside.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        logger.debug("another process was first to write %s", final)
    else:
        logger.info("wrote the embedded digits into %s", final)


def _write(folder: Path) -> None:
    images, labels = read_digits()
    seen = [0] * 10
    for label in range(10):
        for split in ("train", "val"):
            (folder / split / str(label)).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        split = "val" if seen[label] % _EVERY == _EVERY - 1 else "train"
        seen[label] += 1
        grey = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        image = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        image.save(folder / split / str(label) / f"{label}_{number:04d}.JPEG", "JPEG", quality=95)
