"""Checks and decodes image files on the CPU, and normalises pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.models.device import on_device

_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""First bytes of a file -> the bytes that a complete file has within its last _END bytes."""
_END = 64


def checked_size(data: bytes) -> tuple[int, int]:
    """`header_size` for a complete file. Decoders differ in which part of an incomplete file they show.

    If the end does not show that the file is complete, the file is decoded. Raises OSError if it is broken.
    """
    size = header_size(data)
    if not any(data.startswith(start) and end in data[-_END:] for start, end in _ENDS.items()):
        whole_bitmap = data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data)
        if not whole_bitmap:
            decode_rgb(data)
    return size


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width from an image file's header (EXIF orientation ignored). Raises OSError if it cannot be read."""
    with open_image(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes) -> Image.Image:
    """The fully decoded RGB image (EXIF orientation ignored). Raises OSError if the file is broken."""
    with open_image(data) as image:
        try:
            return _eight_bits(image).convert("RGB")
        except (MemoryError, OSError):
            raise
        except Exception as error:  # Pillow's decoders raise many kinds of errors for broken files
            raise OSError(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow would clip it at 255. Raises OSError for pixels whose range is not known."""
    if image.mode == "F":
        raise OSError("its pixels are floating point numbers, of no known range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise OSError("its pixels have more than 16 bits, of no known range: save it with 8 or 16")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def centre_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width of an image's centre; the longer side is at most `longest` times the shorter side.

    The same number of rows or columns is cut on both sides, so the middle stays the middle.
    """
    bound = longest * min(size)
    height, width = (side if side <= bound else bound - (side - bound) % 2 for side in size)
    return height, width


def bitmap_of(data: bytes, size: tuple[int, int]) -> bytes:
    """A BMP file of the centre of `size` (height, width) of an image. Raises OSError if the image file is broken."""
    image = decode_rgb(data)
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    file = io.BytesIO()
    image.crop((left, top, left + size[1], top + size[0])).save(file, "BMP")
    return file.getvalue()


def decode_error(data: bytes) -> str | None:
    """The reason why an image file cannot be decoded, or None if it can."""
    try:
        decode_rgb(data)
    except OSError as error:
        return str(error)
    return None


def normalise(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Converts uint8 (N, 3, H, W) to float32: (pixel / 255 - mean) / std for each channel, on the same device."""
    mean, std = (on_device(torch.tensor(of), images.device).view(1, 3, 1, 1) * 255 for of in (config.mean, config.std))
    return (images.float() - mean).div_(std)


def open_image(data: bytes) -> Image.Image:
    """The image with its header parsed and its pixels not yet decoded. Raises OSError if that fails."""
    if not data:
        raise OSError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:
        raise OSError(f"not an image that can be read ({type(error).__name__})") from error
