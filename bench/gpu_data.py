"""bench/gpu.py, training on JPEG files: the loaders alone, the product's loop with them, the bare loop beside it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import data as loaders
import gpu_packages
import numpy as np
import torch
from gpu_machine import usable_cpus
from gpu_networks import device_of
from gpu_results import Rows
from gpu_training import AUTOTUNED, Mode, bare_seconds, product_seconds, side_of
from PIL import Image
from step import InMemory
from timing import Busy

from laasp_ray.config import DataConfig, LoaderName
from laasp_ray.data.loaders.registry import make_loader
from laasp_ray.data.ordering import epoch_batches
from laasp_ray.data.sources.registry import open_source
from laasp_ray.train.data import PhaseData

AIM = 3000.0
"""Images a second of an H100 with data."""
CLASSES = 8


def real_images(options: argparse.Namespace, rows: Rows) -> None:
    """Each way to decode: alone, then in training with GPU and loader side by side."""
    device = device_of(options)
    batch, steps = (4, 2) if options.toy else (128, 60)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        path = as_data_set(options, Path(folder), batch * (steps + 12))
        data = InMemory(batch, steps + 2, device, side_of(options), 1000)
        bare = batch * steps / bare_seconds(data, AUTOTUNED, steps)
        rows.add(f"bare loop, autotuned, {batch} images a step", {"images a second": bare})
        del data
        for name, config in ways(options, path):
            with rows.trying(name):
                alone = loader_alone(config, device, batch, steps)
                rows.add(f"{name}, alone", {"images a second": alone, "threads": config.threads})
            with rows.trying(f"{name}, in training"):
                train_with(options, rows, name, config, AUTOTUNED, batch, steps, bare)


def ways(options: argparse.Namespace, path: Path) -> list[tuple[str, DataConfig]]:
    """DALI with several shares of the GPU's own decoder, and Pillow. DALI is left out if it is missing."""
    side = side_of(options)
    config = DataConfig(
        path=str(path), format="folder", image_size=side, eval_resize=side, threads=min(16, usable_cpus())
    )
    found: list[tuple[str, DataConfig]] = []
    if not gpu_packages.missing(["nvidia.dali"]):
        for load in (0.65,) if options.toy else (0.65, 0.0, 0.9, 0.3):
            what = f"DALI, hw_decoder_load {load}"
            found.append((what, dataclasses.replace(config, loader=_loader("dali"), hw_decoder_load=load)))
    return [*found, ("Pillow", dataclasses.replace(config, loader=_loader("torchvision")))]


def _loader(name: LoaderName) -> LoaderName:
    return name


def loader_alone(config: DataConfig, device: torch.device, batch: int, steps: int) -> float:
    """Images a second that arrive on the device with nothing else to do, after a first round that does not count."""
    source = open_source(config, "train")
    loader = make_loader(source, config, training=True, device=device, max_batch=batch)
    try:
        batches = epoch_batches(len(source), batch_size=batch, seed=0, epoch=0)[: steps // 2 + 1]
        loaders.images_per_second(loader, batches[:4], 0)
        return loaders.images_per_second(loader, batches, 1)
    finally:
        loader.close()


def train_with(
    options: argparse.Namespace,
    rows: Rows,
    name: str,
    config: DataConfig,
    mode: Mode,
    batch: int,
    steps: int,
    bare: float,
) -> None:
    device = device_of(options)
    data: Any = PhaseData(config, batch_size=batch, seed=0, device=device)
    try:
        with Busy(device.type == "cuda") as busy:
            batches = len(epoch_batches(data.train_images, batch_size=batch, seed=0, epoch=0))
            steps = min(steps, batches - 1)
            rate = batch * steps / product_seconds(data, mode, steps, batches)
    finally:
        data.close()
    figures = {"images a second": rate, "of bare": rate / bare, "files": data.train_images}
    if busy.share is not None:
        figures["GPU idle share"] = 1 - busy.share
    passed = None if options.toy or name == "Pillow" else rate >= min(AIM, 0.95 * bare)
    rows.add(f"{name}, in training ({mode.name}), {batch} images a step", figures, passed)


def as_data_set(options: argparse.Namespace, folder: Path, wanted: int) -> Path:
    """A data set of `train` and `val` with about `wanted` training files: those of --images, or drawn ones.

    Few files come several times, by links, so that an epoch is long enough.
    """
    source = options.images
    if source is None:
        source = folder / "drawn"
        draw(source, 16 if options.toy else 1024)
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    if not classes:
        raise RuntimeError(f"{source} has no class folders")
    files = sum(1 for path in classes for _ in path.iterdir())
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "data" / "val").mkdir()
    for number, path in itertools.product(range(max(1, min(64, wanted // files))), classes):
        (folder / "data" / "train" / path.name).mkdir(exist_ok=True)
        for file in path.iterdir():
            (folder / "data" / "train" / path.name / f"{number}-{file.name}").symlink_to(file.resolve())
    for path in classes:  # a test set must have the classes of the training set
        (folder / "data" / "val" / path.name).symlink_to(path.resolve())
    return folder / "data"


def draw(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375 with coarse and fine structure: about 100 kB each, as ImageNet's."""
    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True)
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(functools.partial(_draw_one, folder), range(count)))


def _draw_one(folder: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = coarse.resize((500, 375), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, np.float32) + generator.normal(0, 14, (375, 500, 3)).astype(np.float32)
    file = folder / f"class{number % CLASSES}" / f"{number}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=88)
