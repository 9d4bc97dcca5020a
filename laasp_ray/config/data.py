"""The section `data`: the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from laasp_ray.config.fields import Doc, check, check_types
from laasp_ray.config.names import is_import_path

DATA_FORMATS = ("auto", "digits", "folder", "parquet", "cifar_batches", "tar", "webdataset")
"""Built-in values of `data.format`: the layouts of data/sources/registry.py, `digits` and `auto`. Import paths are also
allowed.
"""
GIVEN = "given"
"""The value of `data.factory` and `train.loss` of a run whose own is a Python object that `prune` is given."""
TrainTransform = Literal["random_resized_crop", "pad_crop"]
LoaderName = Literal["auto", "dali", "torchvision"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are, and how they are cropped and normalised.

    Training images are cropped by `train_transform` and flipped at random. Evaluation images are resized so that the
    shorter side is `eval_resize`; then the centre of `image_size` is cropped. `format` may be an import path,
    package.module:name: it is called with this config and the split, and returns an ImageSource (data/sources/base.py).

    With `factory` the examples are those of a map-style data set of the user's own, which crops and normalises itself
    (data/examples/source.py). Only `arguments`, `collate` and `workers` belong to it; the keys of images have no
    effect.
    """

    path: Annotated[str | None, Doc("the data set's folder; none: the embedded set of handwritten digits")] = None
    format: Annotated[
        str,
        Doc(
            "how the images are stored: digits, folder, parquet, cifar_batches, tar, webdataset, an import path, "
            "or auto: found by what lies in the folder"
        ),
    ] = "auto"
    label: Annotated[
        str | None,
        Doc(
            "the column of the labels in Parquet files or in CIFAR-100's own, such as coarse_label; "
            "none: label, labels or fine_label"
        ),
    ] = None
    train_transform: Annotated[
        TrainTransform, Doc("crop of a training image: random_resized_crop (scale, ratio) or pad_crop (pad)")
    ] = "random_resized_crop"
    image_size: Annotated[int, Doc("height and width of an image as the network gets it, pixels")] = 224
    eval_resize: Annotated[
        int, Doc("shorter side of an image to evaluate before its crop, pixels, at least image_size; 0: not resized")
    ] = 256
    pad: Annotated[int, Doc("zeros around a training image before pad_crop, pixels")] = 4
    scale: Annotated[
        tuple[float, float], Doc("share of the area that random_resized_crop keeps, lowest and highest, 0 to 1")
    ] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], Doc("width / height of random_resized_crop's window, lowest and highest")] = (
        3 / 4,
        4 / 3,
    )
    flip: Annotated[float, Doc("probability that a training image is mirrored left to right")] = 0.5
    mean: Annotated[tuple[float, float, float], Doc("subtracted from a pixel, for each channel, pixels in 0..1")] = (
        0.485,
        0.456,
        0.406,
    )
    std: Annotated[
        tuple[float, float, float], Doc("what a pixel is then divided by, for each channel, pixels in 0..1")
    ] = (0.229, 0.224, 0.225)
    loader: Annotated[LoaderName, Doc("what decodes and crops; auto: DALI where it runs, else torchvision")] = "auto"
    threads: Annotated[int, Doc("threads of a loader, at least 1")] = 2
    hw_decoder_load: Annotated[
        float, Doc("share of JPEG files that a GPU's own decoder takes, if it has one and DALI decodes, 0 to 1")
    ] = 0.65
    max_unreadable: Annotated[int, Doc("images that may be left out as unreadable before the run ends")] = 20
    factory: Annotated[
        str, Doc("import path of a function of the split that gives a data set of your own; empty: images, as above")
    ] = ""
    arguments: Annotated[Mapping[str, Any], Doc("further keyword arguments of data.factory")] = field(
        default_factory=dict
    )
    collate: Annotated[
        str, Doc("import path of what makes (inputs, targets) of a list of examples; empty: torch's default_collate")
    ] = ""
    workers: Annotated[
        int, Doc("processes that read the examples of data.factory ahead; 0: the training process, between its steps")
    ] = 0

    def __post_init__(self) -> None:
        check_types(self, "data.")
        known = self.format in DATA_FORMATS or is_import_path(self.format)
        check(known, "data.format", self.format, f"one of {', '.join(map(repr, DATA_FORMATS))}, or an import path")
        check(self.label is None or bool(self.label.strip()), "data.label", self.label, "the name of a column")
        check(self.image_size >= 1, "data.image_size", self.image_size, "at least 1")
        check(
            self.eval_resize == 0 or self.eval_resize >= self.image_size,
            "data.eval_resize",
            self.eval_resize,
            f"0 or at least data.image_size ({self.image_size})",
        )
        check(self.pad >= 0, "data.pad", self.pad, "at least 0")
        check(0 < self.scale[0] <= self.scale[1] <= 1, "data.scale", self.scale, "0 < low <= high <= 1")
        check(0 < self.ratio[0] <= self.ratio[1], "data.ratio", self.ratio, "0 < low <= high")
        check(0 <= self.flip <= 1, "data.flip", self.flip, "a probability")
        check(min(self.std) > 0, "data.std", self.std, "positive numbers")
        check(self.threads >= 1, "data.threads", self.threads, "at least 1")
        check(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "a share from 0 to 1")
        check(self.max_unreadable >= 0, "data.max_unreadable", self.max_unreadable, "at least 0")
        check(self.workers >= 0, "data.workers", self.workers, "at least 0")
        named = self.factory in ("", GIVEN) or is_import_path(self.factory)
        check(named, "data.factory", self.factory, "an import path, package.module:name")
        check(not self.collate or is_import_path(self.collate), "data.collate", self.collate, "an import path")
        if not self.factory:
            for key in ("arguments", "collate", "workers"):
                value = getattr(self, key)
                check(not value, f"data.{key}", value, "left out without data.factory, whose it is")
