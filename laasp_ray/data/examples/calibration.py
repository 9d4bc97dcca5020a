"""The calibration set of a data set of the user's own: examples drawn once, as training sees them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from laasp_ray.data.examples.nested import digest_of
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.ordering import derive_seed, shuffled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationExamples:
    """`examples` before they are collated, and their `indices` (n,) in the training data. `digest` is over their
    content.
    """

    examples: tuple[Any, ...]
    indices: np.ndarray
    digest: str


def draw_calibration_examples(source: Examples, *, images: int, seed: int) -> CalibrationExamples:
    """Draws `images` training examples, shuffled, or all if there are fewer. Random augmentation is drawn once.

    The result depends only on the data and on the run's `seed`.
    """
    own_seed = derive_seed(seed, "subset")
    chosen = shuffled(len(source), own_seed)[:images]
    if len(chosen) < images:
        logger.info("the calibration set has %d examples, %d were asked for: there are no more", len(chosen), images)
    examples = tuple(source.example(index, own_seed, 0) for index in chosen.tolist())
    return CalibrationExamples(examples, chosen, digest_of(examples))
