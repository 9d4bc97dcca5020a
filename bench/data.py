"""Images per second of the DALI and the torchvision loader, side by side, in training and in evaluation.

    python bench/data.py [PATH] [--threads 2] [--runs 5] ...

PATH is a data set that laasp_ray opens, or a folder of class folders (`<class>/*.JPEG`); without it the embedded digits
are used. Both loaders get the same batches, in turns, after one round each that does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine

from laasp_ray.config import DataConfig, LoaderName
from laasp_ray.data.loaders.registry import Loader, make_loader
from laasp_ray.data.ordering import epoch_batches
from laasp_ray.data.sources.registry import open_source

LOADERS: tuple[LoaderName, ...] = ("dali", "torchvision")


def main() -> None:
    options = parse()
    with data_set(options.path) as path:
        config = DataConfig(
            path=path,
            image_size=options.image_size,
            eval_resize=options.eval_resize,
            train_transform=options.train_transform,
            threads=options.threads,
        )
        print(machine("pillow", "nvidia-dali-cuda130"))
        print(
            f"{options.path or 'the embedded digits'}: {options.train_transform} to {options.image_size}, evaluation "
            f"at {options.eval_resize}, batches of {options.batch_size}, {options.threads} threads, {options.device}"
        )
        print(f"images per second, median of {options.runs} runs (least to most)")
        print(f"{'':12}" + "".join(f"{name:>32}" for name in LOADERS) + f"{'ratio':>10}")
        for training in (True, False):
            rates = measure(config, training, options)
            medians = [statistics.median(rates[name]) for name in LOADERS]
            cells = [
                f"{median:.0f} ({min(rates[name]):.0f} to {max(rates[name]):.0f})"
                for name, median in zip(LOADERS, medians, strict=True)
            ]
            print(
                f"{'training' if training else 'evaluation':12}"
                + "".join(f"{cell:>32}" for cell in cells)
                + f"{medians[0] / medians[1]:>10.2f}"
            )


def measure(config: DataConfig, training: bool, options: argparse.Namespace) -> dict[LoaderName, list[float]]:
    """Images per second of every counted run, by loader; the loaders take iterations, each living for all of its
    runs."""
    source = open_source(config, "train")
    batches = rounds(len(source), options)
    rates: dict[LoaderName, list[float]] = {name: [] for name in LOADERS}
    with contextlib.ExitStack() as opened:
        loaders: dict[LoaderName, Loader] = {}
        for name in LOADERS:
            loaders[name] = make_loader(
                source,
                dataclasses.replace(config, loader=name),
                training=training,
                device=torch.device(options.device),
                max_batch=options.batch_size,
            )
            opened.callback(loaders[name].close)
        for run in range(options.runs + 1):
            for name in LOADERS:
                rate = images_per_second(loaders[name], batches, run)
                if run > 0:
                    rates[name].append(rate)
    return rates


def rounds(count: int, options: argparse.Namespace) -> list[np.ndarray]:
    """Batches of at least `options.images` images in all: a small data set comes several times."""
    batches: list[np.ndarray] = []
    while sum(map(len, batches)) < options.images:
        batches += epoch_batches(count, batch_size=options.batch_size, seed=0, epoch=len(batches))
    total = np.cumsum([len(batch) for batch in batches])
    return batches[: int(np.searchsorted(total, options.images)) + 1]


def images_per_second(loader: Loader, batches: list[np.ndarray], epoch: int) -> float:
    started = time.perf_counter()
    images = 0
    for batch in loader.epoch(batches, epoch):
        images += len(batch.indices)
    if batch.images.device.type == "cuda":
        torch.cuda.synchronize(batch.images.device)
    return images / (time.perf_counter() - started)


@contextlib.contextmanager
def data_set(path: str | None) -> Iterator[str | None]:
    """`path` as laasp_ray opens it: a folder of class folders is put under a `train` of its own for the time."""
    if path is None or (Path(path) / "train").is_dir() or not any(Path(path).glob("*/*.[jJ][pP]*")):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train").symlink_to(Path(path).resolve())
        yield folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", nargs="?", help="data set, or a folder of class folders; default: the embedded digits")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--eval-resize", type=int, default=256)
    parser.add_argument("--train-transform", default="random_resized_crop", choices=("random_resized_crop", "pad_crop"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="images per run, at least")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for mixed decoding by DALI")
    return parser.parse_args()


if __name__ == "__main__":
    main()
