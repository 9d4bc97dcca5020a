"""The number of classes, which a recipe names for its own data set, taken from the user's data."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from laasp_ray.cli.flags import sets_key
from laasp_ray.config import RunConfig
from laasp_ray.data.sources.registry import classes_of
from laasp_ray.errors import ConfigError, DataError

NUM_CLASSES = "num_classes"


def with_classes_of_data(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """`config` with as many classes as the training data have, and a line on stderr that says so.

    The recipe's number stays if it fits, if the user sets `model.arguments` or a part of it, if weights are given,
    which have classes of their own, and if the data or the loss are the user's own, whose outputs need not be classes.
    Raises the errors of `open_source`.
    """
    named = config.model.arguments.get(NUM_CLASSES)
    if config.data.factory or config.train.loss:
        return config
    if named is None or config.train.pretrained is not None or sets_key(options, "model.arguments"):
        return config
    try:
        classes = len(classes_of(config.data))
    except (DataError, ConfigError):
        return config
    if classes == named:
        return config
    print(
        f"The training data in {config.data.path or config.data.format} have {classes} classes, the recipe {named}: "
        f"the network is built for {classes} (--set model.arguments.{NUM_CLASSES}=N for another number).",
        file=sys.stderr,
    )
    arguments = {**config.model.arguments, NUM_CLASSES: classes}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arguments=arguments))
