"""A rank's images against the driver's."""

from types import SimpleNamespace

import pytest

from laasp_ray.distributed import train_worker
from laasp_ray.errors import DataError
from laasp_ray.tasks import CLASSIFICATION

OURS = ("a", "b")


def check(monkeypatch, *digests):
    """The check as a rank makes it, when the ranks have these digests."""

    def gather(everyone, own):
        everyone[:] = [(f"10.0.0.{rank} ({own[0]})", digest) for rank, digest in enumerate(digests)]

    monkeypatch.setattr(train_worker.dist, "all_gather_object", gather)
    monkeypatch.setattr(train_worker.ray.util, "get_node_ip_address", lambda: "10.0.0.9")
    data = SimpleNamespace(
        world=len(digests), train_images=9, test_images=3, digest=lambda: digests[0], task=CLASSIFICATION
    )
    train_worker._check_same_data(data, OURS)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_drivers_images_everywhere_are_right(monkeypatch, ranks):
    check(monkeypatch, *[OURS] * ranks)


@pytest.mark.parametrize("digests", [[("a", "c")], [OURS, ("d", "b"), OURS], [("d", "b")] * 2])
def test_a_rank_with_others_is_named_even_if_it_is_alone_or_all_have_them(monkeypatch, digests):
    guilty = next(rank for rank, digest in enumerate(digests) if digest != OURS)
    with pytest.raises(DataError, match=rf"different images: those on 10\.0\.0\.{guilty} \(.*the driver's differ"):
        check(monkeypatch, *digests)
