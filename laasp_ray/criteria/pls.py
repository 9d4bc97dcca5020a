"""The criterion pls: the variable importance in projection (VIP) of each feature for the labels, by partial least
squares.

Source: Jordao et al., BMVC workshop 2019 and Neurocomputing 2020, who prune the filters with the lowest VIP. The fit
needs no table of images by features. It needs only counts, class-wise sums and products of the features, which batches
and workers add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import psutil
import torch

from laasp_ray.criteria.of_data import DataCriterion, FirstBatch, Shapes
from laasp_ray.criteria.pooling import pooled
from laasp_ray.criteria.registry import register
from laasp_ray.errors import ConfigError, SearchError

CONSTANT = 1e-12
"""A column is constant if its standard deviation is at most this share of its mean; the rest is rounding."""
CONSTANT_RESPONSE = 1e-7
"""The same for a column of Y, whose mean is not taken off before it is squared."""
EXHAUSTED = 1e-20
"""The labels are explained when X'Y has shrunk to this share (squared) of its first value; the rest is rounding."""
SHOWN = 5
"""The number of columns that an error names."""
MEMORY_SHARE = 0.5
"""The share of free memory that two tables of products, a chunk's and the sum, may use."""


@dataclass(frozen=True)
class ResponseSums:
    """What one-hot labels tell by themselves and other responses Y (n, K) do not: the `number` () of examples, the sum
    of X - pilot (D,), and the sum of Y's squares (K,). All float64.
    """

    number: torch.Tensor
    features: torch.Tensor
    squares: torch.Tensor

    def add(self, number: torch.Tensor, features: torch.Tensor, squares: torch.Tensor) -> None:
        """Adds sums of other examples in place."""
        self.number.add_(number.to(self.number))
        self.features.add_(features.to(self.features))
        self.squares.add_(squares.to(self.squares))


@dataclass(frozen=True)
class Moments:
    """Sums over n images' features X (n, D) and one-hot labels or other responses Y (n, K), all float64 on one device.

    Features are measured from a `pilot` mean (D,), any value near the true mean, to avoid cancellation. `counts` (K,)
    are the images of each class, or the sums of Y, `sums` (K, D) is Y'(X - pilot), `products` (D, D) is (X -
    pilot)'(X - pilot). Moments with the same pilot can be added, image by image or part by part. `others` is None for
    class labels.
    """

    pilot: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    products: torch.Tensor
    others: ResponseSums | None = None

    @staticmethod
    def empty(pilot: torch.Tensor, classes: int, *, responses: bool = False) -> Moments:
        """The moments of no images; `pilot` is (D,). With `responses` those of `classes` columns of numbers."""
        pilot = pilot.double()
        zeros, columns = pilot.new_zeros, len(pilot)
        others = ResponseSums(zeros(()), zeros(columns), zeros(classes)) if responses else None
        return Moments(pilot, zeros(classes), zeros(classes, columns), zeros(columns, columns), others)

    @property
    def images(self) -> int:
        return int(self.counts.sum() if self.others is None else self.others.number)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch in place: `features` (n, D), `labels` (n,) class indices or responses (n, K). Raises ValueError
        for other shapes.
        """
        if features.shape != (len(labels), len(self.pilot)):
            raise ValueError(f"features {tuple(features.shape)} of {len(labels)} labels and {len(self.pilot)} columns")
        shifted = features.to(self.pilot) - self.pilot
        labels = labels.to(self.pilot.device)
        if self.others is None:
            # A product is used because index_add_ adds in no fixed order on a GPU.
            members = torch.nn.functional.one_hot(labels, len(self.counts)).double()
        else:
            members = labels.double()
            self.others.add(members.new_tensor(len(members)), shifted.sum(dim=0), members.square().sum(dim=0))
        self.counts.add_(members.sum(dim=0))
        self.sums.addmm_(members.T, shifted)
        self.products.addmm_(shifted.T, shifted)

    def merge(self, other: Moments) -> None:
        """Adds the moments of other images in place. Raises ValueError if their pilot or their classes differ."""
        if self.sums.shape != other.sums.shape or not torch.equal(self.pilot, other.pilot.to(self.pilot)):
            raise ValueError("moments add up only if their pilot mean and number of classes are the same")
        self.counts.add_(other.counts.to(self.counts))
        self.sums.add_(other.sums.to(self.sums))
        self.products.add_(other.products.to(self.products))
        if self.others is not None and other.others is not None:
            self.others.add(other.others.number, other.others.features, other.others.squares)


@register("pls")
@dataclass(frozen=True)
class Pls(DataCriterion[Moments]):
    """VIP of filters' pooled outputs, with all layers in one fit of `components`. A filter's VIP is the mean over its
    windows.

    It raises the errors of `vip` and `pooled`.
    """

    takes_responses: ClassVar[bool] = True
    components: int = 2
    pooling: str = "max"

    def check(self, shapes: Shapes, device: torch.device) -> None:
        """Raises ConfigError if the products of all features do not fit into memory."""
        columns = sum(filters * windows for filters, windows in shapes.values())
        wanted = 2 * 8 * columns**2
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if wanted > MEMORY_SHARE * free:
            raise ConfigError(
                f"prune.pooling {self.pooling!r} gives {columns} features, whose products take {wanted / 1e9:.1f} GB "
                f"of the {free / 1e9:.1f} GB that are free: pool in larger windows (such as max8x8) or whole (max, "
                "avg), or name layers in prune.ignored"
            )

    def features(self, output: torch.Tensor) -> torch.Tensor:
        return pooled(output, self.pooling)

    def start(self, first: FirstBatch) -> Moments:
        pilot = torch.cat([mean.flatten() for mean in first.means.values()])
        return Moments.empty(pilot, first.classes, responses=first.responses)

    def accumulate(self, state: Moments, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> Moments:
        state.add(torch.cat([part.flatten(1) for part in features.values()], dim=1), labels)
        return state

    def merge(self, state: Moments, other: Moments) -> Moments:
        state.merge(other)
        return state

    def scores(self, state: Moments, shapes: Shapes) -> dict[str, torch.Tensor]:
        """The scores are on the CPU, float64."""
        columns = vip(state, self.components).cpu()
        parted = columns.split([filters * windows for filters, windows in shapes.values()])
        pairs = zip(shapes.items(), parted, strict=True)
        return {layer: values.unflatten(0, shape).mean(dim=1) for (layer, shape), values in pairs}


def vip(moments: Moments, components: int) -> torch.Tensor:
    """VIP (D,), float64, of every column for the classes, by a fit of `components`. The mean of its squares is 1.

    X and Y are centred and scaled by their standard deviation (of n - 1). A constant column is not scaled, and its VIP
    is 0. The fit ends early when nothing is left to explain. The result equals scikit-learn's PLSRegression at
    tol=1e-16. Raises SearchError for features that are not finite, for fewer than two images, and if no feature varies
    with the class. (Method: Wold's PLS2, on the cross products alone: Dayal and MacGregor 1997.)
    """
    _check(moments)
    scaled = _Scaled(moments)
    columns = len(moments.pilot)
    left = scaled.cross  # X'Y minus the part that the components so far explain
    first = 0.0
    rotations: list[torch.Tensor] = []
    loadings: list[torch.Tensor] = []
    importance, total = torch.zeros_like(moments.pilot), 0.0
    for _ in range(min(components, columns)):
        values, vectors = torch.linalg.eigh(left.T @ left)
        first = first or float(values[-1])
        if float(values[-1]) <= EXHAUSTED * first:
            break
        weight = left @ vectors[:, -1]
        weight = weight / weight.norm()
        rotation = weight.clone()
        for loading, earlier in zip(loadings, rotations, strict=True):
            rotation -= (loading @ weight) * earlier
        image = scaled.times(rotation)
        spread = float(rotation @ image)
        if spread <= 0:
            break
        loading, response = image / spread, left.T @ rotation / spread
        explained = spread * float(response @ response)
        importance += explained * weight.square()
        total += explained
        rotations.append(rotation)
        loadings.append(loading)
        left = left - spread * torch.outer(loading, response)
    if total == 0:
        what = "classes" if moments.others is None else "responses"
        raise SearchError(
            f"no feature of the {moments.images} images tells their {what} apart: draw more images, of several {what} "
            "(search.images)"
        )
    return (columns * importance / total).sqrt()


class _Scaled:
    """X'X and X'Y of the centred and scaled X and Y. The products of the moments are not copied or changed."""

    def __init__(self, moments: Moments) -> None:
        self._products, self._images = moments.products, moments.images
        others = moments.others
        self._mean = (moments.sums.sum(dim=0) if others is None else others.features) / self._images
        spread = (moments.products.diagonal() - self._images * self._mean.square()).clamp_min(0)
        deviation = (spread / (self._images - 1)).sqrt()
        constant = deviation <= CONSTANT * (moments.pilot + self._mean).abs()
        # Only rounding is left in a constant column, so it is set to zero.
        self._inverse = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, deviation))
        of_classes = self._deviation_of_classes(moments.counts / self._images, others)
        centred = moments.sums.T - torch.outer(self._mean, moments.counts)
        self.cross = torch.where(of_classes == 0, 0.0, centred * self._inverse.unsqueeze(1) / of_classes)

    def _deviation_of_classes(self, mean: torch.Tensor, others: ResponseSums | None) -> torch.Tensor:
        """That of each column of Y; 0 for a constant one: a class that has all images or none, a fixed response."""
        if others is None:
            return (self._images * mean * (1 - mean) / (self._images - 1)).sqrt()
        spread = (others.squares - self._images * mean.square()).clamp_min(0)
        deviation = (spread / (self._images - 1)).sqrt()
        return torch.where(deviation <= CONSTANT_RESPONSE * mean.abs(), 0.0, deviation)

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """X'X times `vector` (D,)."""
        vector = vector * self._inverse
        return (self._products @ vector - self._images * (self._mean @ vector) * self._mean) * self._inverse


def _check(moments: Moments) -> None:
    if moments.images < 2:
        raise SearchError(f"VIP needs two images at least, has {moments.images}: raise search.images")
    finite = moments.sums.isfinite().all(dim=0) & moments.products.diagonal().isfinite()
    if not bool(finite.all()):
        wrong = (~finite).nonzero().flatten().tolist()
        raise SearchError(
            f"{len(wrong)} of {len(finite)} features are not finite (columns {wrong[:SHOWN]}): "
            "have the weights diverged?"
        )
