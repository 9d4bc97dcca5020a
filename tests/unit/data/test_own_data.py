"""A data set of the user's own: its examples, batches and calibration set are functions of (seed, epoch, index)."""

import pickle
import random

import numpy as np
import own_examples
import pytest
import torch

from laasp_ray.data.examples.calibration import draw_calibration_examples
from laasp_ray.data.examples.loader import ExampleLoader
from laasp_ray.data.examples.nested import digest_of, map_tensors, on_device
from laasp_ray.data.examples.source import OwnData, check_example_identity
from laasp_ray.errors import DataError

CPU = torch.device("cpu")
TRAIN = OwnData(own_examples.data).open("train")


class Draws:
    """Items draw from all three global generators."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(1), torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])


def epoch_of(examples, batches, epoch=0, workers=0, seed=5):
    loader = ExampleLoader(examples, device=CPU, seed=seed, workers=workers)
    return [(batch.images, batch.labels, batch.indices.tolist()) for batch in loader.epoch(batches, epoch)]


BATCHES = [np.array([4, 0]), np.array([1, 2, 3])]


@pytest.mark.parametrize("factory", [own_examples.data, lambda split: Draws()])
def test_batches_do_not_depend_on_the_processes_that_read_them(factory):
    examples = OwnData(factory).open("train")
    here = epoch_of(examples, BATCHES)
    for workers in (1, 2):
        spread = epoch_of(examples, BATCHES, workers=workers)
        assert [indices for *_, indices in spread] == [[4, 0], [1, 2, 3]]
        assert digest_of(spread) == digest_of(here)


def test_an_example_depends_on_seed_epoch_and_index_alone():
    examples = OwnData(lambda split: Draws()).open("train")
    by_index = {i: targets[row] for _, targets, indices in epoch_of(examples, BATCHES) for row, i in enumerate(indices)}
    other_order = epoch_of(examples, [np.array([3, 1, 0])])[0]
    assert all(torch.equal(other_order[1][row], by_index[index]) for row, index in enumerate((3, 1, 0)))
    assert not torch.equal(epoch_of(examples, [np.array([3])], epoch=1)[0][1][0], by_index[3])
    assert not torch.equal(epoch_of(examples, [np.array([3])], seed=6)[0][1][0], by_index[3])


def test_the_global_generators_are_left_as_they_were():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    for workers in (0, 1):
        epoch_of(OwnData(lambda split: Draws()).open("train"), BATCHES, workers=workers)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


class Broken(own_examples.Noise):
    def __getitem__(self, index):
        if index == 2:
            raise ValueError("half a file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_ends_the_epoch_with_its_name(workers):
    with pytest.raises(DataError, match=r"^example 2 of the train data cannot be read \(ValueError: half a file\)"):
        epoch_of(OwnData(Broken).open("train"), BATCHES, workers=workers)


def test_the_calibration_set_is_drawn_from_the_seed():
    drawn, again = (draw_calibration_examples(TRAIN, images=10, seed=1) for _ in range(2))
    assert drawn.digest == again.digest and len(set(drawn.indices.tolist())) == len(drawn.examples) == 10
    assert draw_calibration_examples(TRAIN, images=10, seed=2).digest != drawn.digest
    every = draw_calibration_examples(TRAIN, images=100, seed=1)
    assert sorted(every.indices.tolist()) == list(range(24))
    assert every.indices[:10].tolist() == drawn.indices.tolist()


def test_other_data_are_refused():
    known = TRAIN.identity()
    check_example_identity(known, OwnData(own_examples.data).open("train"))
    with pytest.raises(DataError, match=r"not those that the run began with \(23 examples now, 24 at its start"):
        check_example_identity(known, OwnData(own_examples.data, {"count": 23}).open("train"))
    with pytest.raises(DataError, match=r"\(24 examples now, 24 at its start, or others\)"):
        check_example_identity(known, OwnData(own_examples.data, {"augment": False}).open("train"))


def test_a_worker_gets_the_factory_and_not_the_data():
    own = OwnData(own_examples.data, {"count": 7})
    own.open("train")
    assert own.open("train") is own.open("train")
    received = pickle.loads(pickle.dumps(own))
    assert received._opened == {} and len(received.open("train")) == 7


def test_structures_keep_their_types():
    value = {"a": [torch.ones(2), "b"], "c": (torch.zeros(1), None)}
    doubled = map_tensors(value, lambda tensor: tensor + 1)
    assert doubled["a"][0].tolist() == [2, 2] and doubled["a"][1] == "b" and type(doubled["c"]) is tuple
    assert digest_of(on_device(value, CPU)) == digest_of(value) != digest_of(doubled)
    assert digest_of(torch.zeros(2)) != digest_of(torch.zeros(1, 2)) != digest_of(torch.zeros(1, 2).int())
