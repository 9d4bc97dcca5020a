"""The calibration set of a run, from the images or examples that were drawn."""

from __future__ import annotations

from laasp_ray.config import DataConfig, SearchConfig
from laasp_ray.data.calibration import CalibrationImages
from laasp_ray.data.examples.calibration import CalibrationExamples
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.search.evaluate import Calibration, CalibrationSet, ExampleSet
from laasp_ray.tasks import Task

Drawn = CalibrationImages | CalibrationExamples


def calibration_set(drawn: Drawn, data: DataConfig, search: SearchConfig, task: Task) -> Calibration:
    """The set on the CPU, in batches of `search.batch_size`. Images are normalised as `data` says."""
    if isinstance(drawn, CalibrationExamples):
        return ExampleSet(drawn.examples, search.batch_size, task)
    return CalibrationSet(
        drawn.images, drawn.labels, search.batch_size, lambda batch: normalise(batch, data), task=task
    )
