"""Images that were left out and later deleted: their places are kept, so that all other images keep theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from laasp_ray.data.sources.base import ImageSource, Split
from laasp_ray.records import Place


class WithPlaces:
    """`source` with deleted images at the `missing` indices of the whole. Deleted images cannot be read."""

    def __init__(self, source: ImageSource, missing: Iterable[Place]) -> None:
        self._source = source
        self._missing = {place.index: place.name for place in missing}
        labels = {place.index: place.label for place in missing}
        count = len(source) + len(labels)
        self._own = np.setdiff1d(np.arange(count, dtype=np.int64), np.array(sorted(labels), np.int64))
        self.classes = source.classes
        self.shard_list_digest = getattr(source, "shard_list_digest", None)
        self.labels = np.empty(count, np.int64)
        self.labels[self._own] = source.labels
        for index, label in labels.items():
            self.labels[index] = label

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        if index in self._missing:
            raise FileNotFoundError(f"{self._missing[index]} was left out, and is not there any more")
        return self._source.read(self._place(index))

    def name(self, index: int) -> str:
        return self._missing[index] if index in self._missing else self._source.name(self._place(index))

    def _place(self, index: int) -> int:
        return int(np.searchsorted(self._own, index))


def with_places(source: ImageSource, split: Split, places: Iterable[Place]) -> ImageSource:
    """`source` with placeholders for images that were left out and then deleted. `places` are their places at the run's
    start.

    Order, augmentation and the choice of the calibration set depend on an image's number, which a deletion would
    change.
    """
    missing: list[Place] = []
    for place in sorted((place for place in places if place.split == split), key=lambda place: place.index):
        # The place can be beyond the end if other images were deleted too. The check of the identity reports that.
        here = min(place.index - len(missing), len(source))
        if here == len(source) or source.name(here) != place.name:
            missing.append(replace(place, index=here + len(missing)))
    return WithPlaces(source, missing) if missing else source


def find_places(names: Collection[str], sources: Mapping[Split, ImageSource]) -> dict[str, Place]:
    """The places of the images called `names` in the splits. A name that is in no split is omitted."""
    wanted = set(names)
    found: dict[str, Place] = {}
    for split, source in sources.items():
        for index in range(len(source)):
            name = source.name(index)
            if name in wanted:
                found[name] = Place(name=name, split=split, index=index, label=int(source.labels[index]))
                if len(found) == len(wanted):
                    return found
    return found
