"""Opens a data set: a layout by name, or a user's own source by import path."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from laasp_ray.config import DATA_FORMATS, DataConfig
from laasp_ray.config.names import is_import_path
from laasp_ray.data.sources.base import ImageSource, Split
from laasp_ray.data.sources.cifar import BATCHES_FOLDER, FOLDER_100, CifarBatchesSource, batches_folder
from laasp_ray.data.sources.custom import open_custom
from laasp_ray.data.sources.digits import ensure_digits
from laasp_ray.data.sources.flat_val import open_flat
from laasp_ray.data.sources.folder import TEST_FOLDERS, FolderSource, class_names, train_folders
from laasp_ray.data.sources.imagenet_tar import TRAIN_TARS, open_train_tar, train_classes, train_tar
from laasp_ray.data.sources.parquet import ParquetSource, parquet_files, stored_classes
from laasp_ray.data.sources.webdataset import open_shards, shards_folder
from laasp_ray.errors import ConfigError, DataError

__all__ = ["LAYOUTS", "ImageSource", "Layout", "Split", "classes_of", "open_source", "open_test_source"]


def _never(root: Path) -> bool:
    return False


def _unknown(root: Path, label: str | None) -> tuple[str, ...] | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of a data set in a folder.

    `fits` says whether a folder has this layout. `fits_too` says so if no layout fits. `fits_test` says whether the
    folder has the test images in this layout, without the training images; the layout must store the classes with them.
    `says_classes` is False if the test images' classes are known only from the training images. `looked_for` describes
    the layout, with {root}. A layout with several labels an image has `open_labelled`, which gets data.label too, in
    the place of `open`. `classes` gives the classes without looking at the images, or None where it cannot.
    """

    looked_for: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, Split], ImageSource] | None = None
    fits_too: Callable[[Path], bool] = _never
    fits_test: Callable[[Path], bool] = _never
    says_classes: bool = True
    open_labelled: Callable[[Path, Split, str | None], ImageSource] | None = None
    classes: Callable[[Path, str | None], tuple[str, ...] | None] = _unknown

    def source(self, root: Path, split: Split, label: str | None) -> ImageSource:
        """The images of `split`. Raises ConfigError for a `label` if the layout has one label an image."""
        if self.open_labelled is not None:
            return self.open_labelled(root, split, label)
        if label is not None:
            raise ConfigError(
                f"data.label is {label!r}, and {root} is no data set of Parquet files or CIFAR-100, which alone have "
                "several labels an image: leave it out"
            )
        assert self.open is not None
        return self.open(root, split)


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """The images of `split`. They are checked: not empty, labels in range, and in training at least one image per
    class.

    With `data.path` None it is the built-in set of digits, which is written to a cache folder on first use. Raises
    ConfigError if `data.path` and `data.format` contradict each other, or if an import path gives no ImageSource.
    Raises DataError if the data set does not exist or has another layout. All messages say what was looked for.
    """
    if is_import_path(config.format):
        with _errors_with_name(config):
            return open_custom(config, split)
    if config.path is None or config.format == "digits":
        return FolderSource(_digits(config), split)
    with _errors_with_name(config):
        root = _root(config.path)
        if not root.is_dir():
            raise DataError(f"no data set at {root}: data.path must be a folder, and every worker must see it")
        layout = _detect(root) if config.format == "auto" else LAYOUTS[config.format]
        return layout.source(root, split, config.label)


def classes_of(config: DataConfig) -> tuple[str, ...]:
    """The classes of the training images, where possible without looking at these. Raises the errors of
    `open_source`.
    """
    if not is_import_path(config.format) and config.path is not None and config.format != "digits":
        with _errors_with_name(config):
            root = _root(config.path)
            if root.is_dir():
                layout = _detect(root) if config.format == "auto" else LAYOUTS[config.format]
                found = layout.classes(root, config.label)
                if found is not None:
                    return found
    return open_source(config, "train").classes


def open_test_source(config: DataConfig, classes: tuple[str, ...] | None) -> ImageSource:
    """Opens the test images alone, when the training images may be absent and `classes` are known.

    With `classes` None, and for formats whose test images have their own classes, it does and raises what `open_source`
    does.
    """
    by_name = LAYOUTS.get(config.format)
    elsewhere = config.format != "auto" and (by_name is None or by_name.says_classes)
    if classes is None or config.path is None or elsewhere:
        return open_source(config, "test")
    root = _root(config.path)
    with _errors_with_name(config):
        if not root.is_dir():
            return open_source(config, "test")
        if config.format == "auto":
            telling = [layout for layout in LAYOUTS.values() if layout.says_classes]
            if any(layout.fits(root) for layout in telling):
                return open_source(config, "test")
            for layout in telling:
                if layout.fits_test(root):
                    return layout.source(root, "test", config.label)
        return _test_images(root, classes)


@contextlib.contextmanager
def _errors_with_name(config: DataConfig) -> Iterator[None]:
    """Raises DataError, naming the place, for an error of the file system."""
    try:
        yield
    except OSError as error:
        whole = config.path or config.format
        place = whole if error.filename is None else os.fsdecode(error.filename)
        raise DataError(
            f"the data set in {whole} cannot be read: {place}: {error.strerror or error}; see to its permissions "
            "and to the storage"
        ) from error


def _root(path: str) -> Path:
    if not path.strip():
        raise ConfigError("data.path is empty: name the data set's folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"data.path {path!r}: there is no such user's home here; write the path out") from error


def _digits(config: DataConfig) -> Path:
    if config.path is not None:
        raise ConfigError(
            f"data.format is 'digits' and data.path {config.path!r}: the embedded digits have no path, "
            "leave one of the two out"
        )
    if config.format not in ("auto", "digits"):
        raise ConfigError(f"data.format is {config.format!r} without data.path: name the data set's folder")
    return ensure_digits()


def _detect(root: Path) -> Layout:
    layouts = list(LAYOUTS.values())
    for layout in layouts:
        if layout.fits(root):
            return layout
    for layout in layouts:
        if layout.fits_too(root):
            return layout
    *others, last = (LAYOUTS[name].looked_for.format(root=root) for name in DATA_FORMATS if name in LAYOUTS)
    raise DataError(f"no data set that is known in {root}; looked for {', '.join(others)} and {last}")


def _folders(root: Path, split: Split) -> ImageSource:
    return FolderSource(root, split) if split == "train" else _test_images(root, train_folders(root))


def _tars(root: Path, split: Split) -> ImageSource:
    return open_train_tar(root) if split == "train" else _test_images(root, train_classes(root))


def _test_images(root: Path, classes: tuple[str, ...]) -> ImageSource:
    return open_flat(root, classes) or FolderSource(root, "test", classes)


LAYOUTS: dict[str, Layout] = {
    "cifar_batches": Layout(
        looked_for=f"CIFAR-10's own ({BATCHES_FOLDER}/data_batch_1), CIFAR-100's own ({FOLDER_100}/train)",
        fits=lambda root: batches_folder(root) is not None,
        open_labelled=CifarBatchesSource,
    ),
    "parquet": Layout(
        looked_for="Parquet files (train.parquet, train-*.parquet or train/*.parquet, here or in one folder below)",
        fits=lambda root: bool(parquet_files(root, "train", below=False)),
        fits_too=lambda root: bool(parquet_files(root, "train")),
        fits_test=lambda root: (
            bool(parquet_files(root, "test")) and not any((root / name).is_dir() for name in TEST_FOLDERS)
        ),
        open_labelled=ParquetSource,
        classes=stored_classes,
    ),
    "webdataset": Layout(
        looked_for="WebDataset shards ({root}/train/index.json and *.tar)",
        fits=lambda root: shards_folder(root, "train") is not None,
        open=open_shards,
        fits_test=lambda root: shards_folder(root, "test") is not None,
    ),
    "folder": Layout(
        looked_for="class folders ({root}/train/<class>/*.JPEG)",
        fits=lambda root: (root / "train").is_dir() and bool(class_names(root / "train")),
        open=_folders,
        classes=lambda root, _: train_folders(root),
        says_classes=False,
    ),
    "tar": Layout(
        looked_for=f"ImageNet's own ({' or '.join(TRAIN_TARS)})",
        fits=lambda root: train_tar(root) is not None,
        open=_tars,
        classes=lambda root, _: train_classes(root),
        says_classes=False,
    ),
}
"""data.format -> layout, in the order in which `auto` tries them."""
