"""Decoding and augmentation with Pillow and torchvision, in threads, for platforms without a DALI wheel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from laasp_ray.config import DataConfig
from laasp_ray.data.augmentation import Placement, longest_side, place
from laasp_ray.data.loaders.decoding import decode_rgb, normalise
from laasp_ray.data.loaders.reading import Batch, EncodedBatch, ImageFeed, UnreadableImages
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.models.device import on_device

DECODED_AHEAD = 1


class TorchvisionLoader:
    """Batches through Pillow (see registry.make_loader)."""

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        unreadable: UnreadableImages,
        *,
        training: bool,
        device: torch.device,
        max_batch: int,
        seed: int,
        uint8: bool,
    ) -> None:
        self.name, self.in_background = "torchvision", True
        self._config = config
        self._unreadable = unreadable
        self._training = training
        self._device = device
        self._seed = seed
        self._uint8 = uint8
        self._feed = ImageFeed(
            source,
            unreadable,
            threads=config.threads,
            max_batch=max_batch,
            longest=longest_side(config, training=training),
        )
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="image-decoder")
        self._labels = torch.from_numpy(np.asarray(source.labels, np.int64))
        self._current: object = None

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The decoded batches in order. An unfinished iterator of an earlier epoch can no longer be used."""
        self._current = token = object()
        return self._run(self._feed.read(batches), epoch, token)

    def close(self) -> None:
        """Ends the threads. The loader cannot be used afterwards."""
        self._current = None
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._feed.close()

    def _run(self, arriving: Iterator[EncodedBatch], epoch: int, token: object) -> Iterator[Batch]:
        decoding: deque[_Decoding] = deque()
        while True:
            if self._current is not token:
                raise RuntimeError("this iterator was given up when its loader began another epoch or was closed")
            while len(decoding) <= DECODED_AHEAD and (batch := next(arriving, None)) is not None:
                decoding.append(self._start(batch, epoch))
            if not decoding:
                return
            finished = self._finish(decoding.popleft())
            if finished is not None:
                yield finished

    def _start(self, batch: EncodedBatch, epoch: int) -> _Decoding:
        placement = place(
            batch.indices, batch.sizes, config=self._config, training=self._training, seed=self._seed, epoch=epoch
        )
        side = self._config.image_size
        with torch.inference_mode(False):  # inference mode is per thread, and other threads write into this tensor
            pixels = torch.empty((len(batch), 3, side, side), dtype=torch.uint8)
        positions = np.array_split(np.arange(len(batch)), min(self._config.threads, len(batch)))
        return _Decoding(
            batch, pixels, [self._pool.submit(self._decode, batch, placement, pixels, part) for part in positions]
        )

    def _decode(
        self, batch: EncodedBatch, placement: Placement, pixels: torch.Tensor, positions: np.ndarray
    ) -> dict[int, str]:
        """Writes the images at `positions` into `pixels`. Returns the reasons of failures by position."""
        failures: dict[int, str] = {}
        for position in map(int, positions):
            try:
                pixels[position] = self._pixels(batch.encoded[position], placement, position)
            except OSError as error:
                failures[position] = str(error)
        return failures

    def _pixels(self, data: bytes, placement: Placement, position: int) -> torch.Tensor:
        """The pixels of the image at `position`: (3, image_size, image_size) uint8."""
        image = decode_rgb(data)
        windows, side = placement.windows, self._config.image_size
        window = [int(value[position]) for value in (windows.y, windows.x, windows.height, windows.width)]
        if placement.resized is None:
            image = _resize(transforms.crop(image, *window), (side, side))
        else:
            height, width = placement.resized[position]
            image = transforms.crop(_resize(image, (int(height), int(width))), *window)
        if windows.flip[position]:
            image = transforms.hflip(image)
        return transforms.pil_to_tensor(image)

    def _finish(self, decoding: _Decoding) -> Batch | None:
        failures = {position: reason for future in decoding.futures for position, reason in future.result().items()}
        indices, pixels = decoding.batch.indices, decoding.pixels
        for position, reason in failures.items():
            self._unreadable.leave_out(int(indices[position]), reason)
        if failures:
            keep = np.array([position for position in range(len(indices)) if position not in failures], np.int64)
            indices, pixels = indices[keep], pixels[torch.from_numpy(keep)]
        if not len(indices):
            return None
        labels = on_device(self._labels[torch.from_numpy(indices)], self._device)
        pixels = on_device(pixels, self._device)
        return Batch(pixels if self._uint8 else normalise(pixels, self._config), labels, indices)


@dataclass(frozen=True)
class _Decoding:
    batch: EncodedBatch
    pixels: torch.Tensor
    futures: list[Future[dict[int, str]]]


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if (image.height, image.width) == size:
        return image
    return transforms.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
