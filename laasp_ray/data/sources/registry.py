"""Opens a data set, whatever it is stored in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from laasp_ray.config import DataConfig
from laasp_ray.data.sources.base import ImageSource, Split
from laasp_ray.data.sources.cifar10 import BATCHES_FOLDER, CifarBatchesSource, batches_folder
from laasp_ray.data.sources.digits import ensure_digits
from laasp_ray.data.sources.flat_val import open_flat
from laasp_ray.data.sources.folder import TEST_FOLDERS, FolderSource, class_names, train_folders
from laasp_ray.data.sources.imagenet_tar import TRAIN_TARS, open_train_tar, train_classes, train_tar
from laasp_ray.data.sources.parquet import ParquetSource, parquet_files
from laasp_ray.errors import ConfigError, DataError

__all__ = ["ImageSource", "Split", "open_source", "open_test_source"]


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """The images of `split`, checked: not empty, labels in range, in training at least one image a class.

    `data.path` None is the embedded set of digits, written into a cache folder when it is first needed. Raises
    ConfigError when `data.path` and `data.format` do not fit each other, DataError when the data set is not there or
    not laid out as expected; both say what was looked for.
    """
    if config.path is None or config.format == "digits":
        return FolderSource(_digits(config), split)
    with _told_by_name(config):
        return _opened(_root(config.path), config, split)


@contextlib.contextmanager
def _told_by_name(config: DataConfig) -> Iterator[None]:
    """Raises DataError with the place for what the file system refuses."""
    try:
        yield
    except OSError as error:
        place = config.path if error.filename is None else os.fsdecode(error.filename)
        raise DataError(
            f"the data set in {config.path} cannot be read: {place}: {error.strerror or error}; see to its permissions "
            "and to the storage"
        ) from error


def _root(path: str) -> Path:
    if not path.strip():
        raise ConfigError("data.path is empty: name the data set's folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"data.path {path!r}: there is no such user's home here; write the path out") from error


def _opened(root: Path, config: DataConfig, split: Split) -> ImageSource:
    if not root.is_dir():
        raise DataError(f"no data set at {root}: data.path must be a folder, and every worker must see it")
    found = _detect(root) if config.format == "auto" else config.format
    if found == "parquet":
        return ParquetSource(root, split)
    if found == "cifar_batches":
        return CifarBatchesSource(root, split)
    if split == "train":
        return open_train_tar(root) if found == "tar" else FolderSource(root, split)
    classes = train_classes(root) if found == "tar" else train_folders(root)
    return open_flat(root, classes) or FolderSource(root, split, classes)


def open_test_source(config: DataConfig, classes: tuple[str, ...] | None) -> ImageSource:
    """The test images alone, for training images that may not be there: `classes` are known from elsewhere.

    None, and formats whose test images say their classes themselves: as `open_source`, and raises as that does.
    """
    root = None if config.path is None else _root(config.path)
    if classes is None or root is None or config.format in ("digits", "parquet", "cifar_batches"):
        return open_source(config, "test")
    with _told_by_name(config):
        if not root.is_dir():
            return open_source(config, "test")
        if config.format == "auto":
            if batches_folder(root) is not None or parquet_files(root, "train", below=False):
                return open_source(config, "test")
            if parquet_files(root, "test") and not any((root / name).is_dir() for name in TEST_FOLDERS):
                return ParquetSource(root, "test")
        return open_flat(root, classes) or FolderSource(root, "test", classes)


def _digits(config: DataConfig) -> Path:
    if config.path is not None:
        raise ConfigError(
            f"data.format is 'digits' and data.path {config.path!r}: the embedded digits have no path, "
            "leave one of the two out"
        )
    if config.format not in ("auto", "digits"):
        raise ConfigError(f"data.format is {config.format!r} without data.path: name the data set's folder")
    return ensure_digits()


def _detect(root: Path) -> Literal["folder", "parquet", "cifar_batches", "tar"]:
    if batches_folder(root) is not None:
        return "cifar_batches"
    if parquet_files(root, "train", below=False):
        return "parquet"
    train = root / "train"
    if train.is_dir() and class_names(train):
        return "folder"
    if train_tar(root) is not None:
        return "tar"
    if parquet_files(root, "train"):
        return "parquet"
    raise DataError(
        f"no data set that is known in {root}; looked for class folders ({train}/<class>/*.JPEG), Parquet files "
        f"(train.parquet or train-*.parquet, here or in one folder below), CIFAR-10's own "
        f"({BATCHES_FOLDER}/data_batch_1) and ImageNet's own ({' or '.join(TRAIN_TARS)})"
    )
