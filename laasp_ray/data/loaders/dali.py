"""Decoding and augmentation with NVIDIA DALI. Only this module imports DALI.

The pipeline has no reader and no random numbers of its own: the images and their windows are passed in, so pixels do
not depend on the pipeline's history. Decoding on a GPU uses `mixed`; otherwise no driver is needed.
"""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.augmentation import Placement, longest_side, place
from laasp_ray.data.loaders.decoding import decode_error
from laasp_ray.data.loaders.reading import Batch, EncodedBatch, ImageFeed, UnreadableImages
from laasp_ray.data.ordering import Windows
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import DataError
from laasp_ray.models.device import on_device

logger = logging.getLogger(__name__)

PREFETCH = 2
_SIGNATURES = (
    b"\xff\xd8",  # JPEG
    b"\x89PNG",
    b"BM",
    b"RIFF",  # WebP
    *(b"II*\0", b"MM\0*"),  # TIFF
    *(b"P%d" % number for number in range(1, 7)),
    *(b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51"),  # JPEG 2000
)
"""The first bytes of the files that DALI decodes."""


class DaliLoader:
    """Batches through one DALI pipeline that lives for many epochs (see registry.make_loader).

    If one file of a batch cannot be decoded, DALI's pipeline fails for good. The loader then looks for such files in
    the batches in flight, builds a new pipeline and passes it those batches again. As without DALI, Pillow decides
    which images are broken; these are left out from then on. An image that only Pillow can decode is passed to DALI as
    a bitmap.
    """

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
        self.in_background = True
        self.name = "dali-gpu" if device.type == "cuda" else "dali-cpu"
        self._config = config
        self._unreadable = unreadable
        self._training = training
        self._device = device
        self._max_batch = max_batch
        self._seed = seed
        self._uint8 = uint8
        self._feed = ImageFeed(
            source,
            unreadable,
            threads=config.threads,
            max_batch=max_batch,
            longest=longest_side(config, training=training),
            takes=_takes,
        )
        self._labels = torch.from_numpy(np.asarray(source.labels, np.int64))
        self._pipeline: _DecodePipeline | None = None
        self._in_flight: deque[EncodedBatch] = deque()
        self._current: object = None

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The decoded batches in order. An unfinished iterator of an earlier epoch can no longer be used."""
        self._current = token = object()
        self._drain()
        return self._run(self._feed.read(batches), epoch, token)

    def close(self) -> None:
        """Frees the pipeline and the threads. The loader cannot be used afterwards."""
        self._current = None
        self._in_flight.clear()
        self._pipeline = None
        self._feed.close()

    def _run(self, arriving: Iterator[EncodedBatch], epoch: int, token: object) -> Iterator[Batch]:
        waiting: deque[EncodedBatch] = deque()
        while True:
            if self._current is not token:
                raise RuntimeError("this iterator was given up when its loader began another epoch or was closed")
            pipeline = self._fill(waiting, arriving, epoch)
            if not self._in_flight:
                return
            try:
                images = pipeline.take()
            except RuntimeError as error:
                waiting.extendleft(reversed(self._survivors(error, epoch)))
                continue
            batch = self._in_flight.popleft()
            self._fill(waiting, arriving, epoch)
            labels = on_device(self._labels[torch.from_numpy(batch.indices)], self._device)
            yield Batch(images, labels, batch.indices)

    def _fill(self, waiting: deque[EncodedBatch], arriving: Iterator[EncodedBatch], epoch: int) -> _DecodePipeline:
        """Schedules batches until PREFETCH are in flight or none is left: first the waiting ones, then the arriving
        ones.
        """
        while len(self._in_flight) < PREFETCH:
            batch = waiting.popleft() if waiting else next(arriving, None)
            if batch is None:
                break
            pipeline = self._living_pipeline()
            self._in_flight.append(batch)
            try:
                pipeline.schedule(batch, self._place(batch, epoch))
            except RuntimeError as error:
                waiting.extendleft(reversed(self._survivors(error, epoch)))
        return self._living_pipeline()

    def _living_pipeline(self) -> _DecodePipeline:
        if self._pipeline is None:
            self._pipeline = self._new_pipeline(self._max_batch)
        return self._pipeline

    def _new_pipeline(self, max_batch: int) -> _DecodePipeline:
        return _DecodePipeline(
            self._config, training=self._training, device=self._device, max_batch=max_batch, uint8=self._uint8
        )

    def _place(self, batch: EncodedBatch, epoch: int) -> Placement:
        return place(
            batch.indices, batch.sizes, config=self._config, training=self._training, seed=self._seed, epoch=epoch
        )

    def _drain(self) -> None:
        """Discards the batches in flight of an unfinished epoch."""
        try:
            while self._in_flight:
                self._in_flight.popleft()
                self._living_pipeline().take()
        except RuntimeError as error:
            logger.debug("an abandoned batch could not be decoded, a new pipeline will be built: %s", error)
            self._in_flight.clear()
            self._pipeline = None

    def _survivors(self, error: RuntimeError, epoch: int) -> list[EncodedBatch]:
        """The batches that were in flight when the pipeline failed with `error`, without their broken images."""
        batches = list(self._in_flight)
        self._in_flight.clear()
        self._pipeline = None
        reasons, here = self._undecodable_by_pillow(batches), set[int]()
        if not reasons:
            others = self._undecodable_alone(batches, epoch)
            reasons = {index: reason for index, reason in others.items() if self._feed.decodes_here(index)}
            here = set(others) - set(reasons)
            for index in here:
                logger.info("image number %d is decoded by Pillow: %s", index, others[index])
            batches = [self._feed.decode_here(batch, here) for batch in batches]
        if not reasons and not here:
            raise DataError(
                f"DALI failed on {len(batches)} batches of which every image can be decoded alone; data.loader "
                f"'torchvision' works without DALI. DALI says: {_last_line(error)}"
            ) from error
        for index, reason in reasons.items():
            self._unreadable.leave_out(index, reason)
        return [batch for batch in (batch.without(reasons) for batch in batches) if len(batch)]

    def _undecodable_by_pillow(self, batches: Sequence[EncodedBatch]) -> dict[int, str]:
        suspects = [
            (int(index), data) for batch in batches for index, data in zip(batch.indices, batch.encoded, strict=True)
        ]
        with ThreadPoolExecutor(self._config.threads) as pool:
            errors = pool.map(decode_error, [data for _, data in suspects])
            return {index: reason for (index, _), reason in zip(suspects, errors, strict=True) if reason is not None}

    def _undecodable_alone(self, batches: Sequence[EncodedBatch], epoch: int) -> dict[int, str]:
        """The images that Pillow can decode and DALI cannot (for example a PNG without its end), tried one at a
        time.
        """
        reasons: dict[int, str] = {}
        pipeline = self._new_pipeline(1)
        for alone in (batch.only(position) for batch in batches for position in range(len(batch))):
            try:
                pipeline.schedule(alone, self._place(alone, epoch))
                pipeline.take()
            except RuntimeError as error:
                reasons[int(alone.indices[0])] = f"DALI cannot decode it: {_last_line(error)}"
                pipeline = self._new_pipeline(1)
        return reasons


class _DecodePipeline:
    """A built pipeline. Batches are scheduled, and their pixels taken in the same order. It is lost after a
    RuntimeError.
    """

    def __init__(
        self, config: DataConfig, *, training: bool, device: torch.device, max_batch: int, uint8: bool
    ) -> None:
        self._config = config
        self._device = device
        self._uint8 = uint8
        self._crops_first = training and config.train_transform == "random_resized_crop"
        self._resizes_first = not training and config.eval_resize > 0
        on_gpu = device.type == "cuda"
        device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        self._pipeline = Pipeline(
            batch_size=max_batch,
            num_threads=config.threads,
            device_id=device_id,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(self._graph("mixed" if on_gpu else "cpu"))
        self._pipeline.build()
        self._warm_up()

    def schedule(self, batch: EncodedBatch, placement: Placement) -> None:
        self._feed(batch, placement)
        self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The pixels (n, 3, image_size, image_size) of the oldest scheduled batch, on the device."""
        # On a GPU the output is bound to torch's stream, so DALI reuses its memory only after torch's queued work
        # there. An output of the dynamic executor lives as long as a tensor refers to it, so no copy is needed.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        return torch.from_dlpack(images.as_tensor())

    def _feed(self, batch: EncodedBatch, placement: Placement) -> None:
        windows, feed = placement.windows, self._pipeline.feed_input
        feed("encoded", [np.frombuffer(data, np.uint8) for data in batch.encoded])
        feed("start", np.stack([windows.y, windows.x], axis=1).astype(np.int32))
        feed("flip", windows.flip.astype(np.int32))
        if self._crops_first:
            feed("shape", np.stack([windows.height, windows.width], axis=1).astype(np.int32))
        if self._resizes_first:
            feed("resized", np.asarray(placement.resized, np.float32))

    def _warm_up(self) -> None:
        # The first run of a pipeline stands for PREFETCH runs at once. These get a black image, so that from then on
        # each batch is one run.
        side = self._config.image_size
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, "PNG")
        zero, full = np.zeros(1, np.int64), np.full(1, side, np.int64)
        sizes = np.full((1, 2), side, np.int64)
        placement = Placement(Windows(y=zero, x=zero, height=full, width=full, flip=np.zeros(1, bool)), sizes)
        for _ in range(PREFETCH):
            self._feed(EncodedBatch(zero, [file.getvalue()], sizes), placement)
        self._pipeline.schedule_run()
        for _ in range(PREFETCH):
            self._pipeline.outputs()

    def _graph(self, decoder: str) -> Any:
        config, side = self._config, self._config.image_size
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        # libjpeg on a CPU uses fancy upsampling. Without it a GPU's decoder differs at the edges of colours.
        decoding = {
            "device": decoder,
            "output_type": types.RGB,
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,
        }
        if decoder == "mixed":
            decoding["hw_decoder_load"] = config.hw_decoder_load
        if self._crops_first:
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **decoding)
            images = _resize(images, [side, side])
        else:
            images = fn.decoders.image(encoded, **decoding)
            if self._resizes_first:
                images = _resize(images, fn.external_source(name="resized", dtype=types.FLOAT, ndim=1))
            images = fn.slice(
                images, start=start, shape=[side, side], axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
        mean = [0.0] * 3 if self._uint8 else [255 * value for value in config.mean]
        std = [1.0] * 3 if self._uint8 else [255 * value for value in config.std]
        return fn.crop_mirror_normalize(
            images,
            dtype=types.UINT8 if self._uint8 else types.FLOAT,
            mean=mean,
            std=std,
            mirror=flip,
            output_layout="CHW",
        )


def _takes(data: bytes) -> bool:
    return data.startswith(_SIGNATURES)


def _resize(images: Any, size: Any) -> Any:
    # An image that already has the size is not changed.
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def _last_line(error: Exception) -> str:
    """The last line of DALI's long messages, without the pipeline's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "no longer valid" not in line and not line.startswith(("File ", "C++"))]
    return telling[-1] if telling else type(error).__name__
