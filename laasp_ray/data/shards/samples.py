"""How an image becomes a sample of a shard: its key, the suffix of its format, and the two members in the tar."""

from __future__ import annotations

import re
import tarfile
from pathlib import PurePosixPath

from laasp_ray.data.loaders.decoding import open_image
from laasp_ray.data.sources.base import is_image
from laasp_ray.data.sources.webdataset import LABEL_SUFFIX

_SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "BMP": ".bmp",
    "PPM": ".ppm",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
"""Pillow's name of a format -> the suffix of its files. MPO is a JPEG with more pictures behind it."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_STEM = 60
_FEWEST_DIGITS = 8
END = b"\0" * 2 * tarfile.BLOCKSIZE
"""What a tar ends with."""


def key_of(index: int, count: int, name: str) -> str:
    """The key of image `index` of `count`: its number, padded, then what its file is called, in plain characters.

    In the order of the keys the images are numbered as in the source, so a run on the shards sees the same images in
    the same order as one on the source.
    """
    stem = PurePosixPath(name).name
    stem = stem.rpartition(".")[0] if is_image(stem) else stem
    plain = _UNSAFE.sub("_", stem)[:_LONGEST_STEM]
    return f"{index:0{max(_FEWEST_DIGITS, len(str(count)))}d}-{plain}"


def suffix_of(data: bytes, name: str) -> str:
    """The suffix for an image's content; that of its name, else .jpg, for a format without a usual one."""
    with open_image(data) as image:
        known = _SUFFIXES.get(image.format or "")
    return known or (PurePosixPath(name).suffix.lower() if is_image(name) else ".jpg")


def sample(index: int, count: int, name: str, data: bytes, label: int) -> bytes:
    """The members KEY.jpg and KEY.cls of an image, as they stand in a tar. They depend on the arguments only."""
    key = key_of(index, count, name)
    return member(key + suffix_of(data, name), data) + member(key + LABEL_SUFFIX, str(label).encode())


def member(name: str, content: bytes) -> bytes:
    """A USTAR header for a file of 1970 that belongs to nobody, and the content, padded to whole blocks."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    header = entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return header + content + b"\0" * (-len(content) % tarfile.BLOCKSIZE)
