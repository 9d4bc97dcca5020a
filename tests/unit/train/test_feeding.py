"""Batches that are prepared ahead: the same ones, in order, and nothing is left running."""

import itertools
import threading

import pytest
import torch

from laasp_ray.train.feeding import fed_ahead


def feeding_threads():
    return [thread for thread in threading.enumerate() if thread.name == "feeding"]


def test_the_same_batches_come_in_order_and_the_thread_ends():
    assert list(fed_ahead(iter(range(100)))) == list(range(100))
    assert list(fed_ahead(iter([]))) == []
    assert feeding_threads() == []


def test_no_more_than_the_depth_is_prepared_ahead():
    prepared, may_look = [], threading.Event()

    def batches():
        for number in range(10):
            prepared.append(number)
            if number == 3:  # one is taken, two wait, and this one is in the thread's hand
                may_look.set()
            yield number

    fed = fed_ahead(batches(), depth=2)
    assert next(fed) == 0
    assert may_look.wait(5)
    assert prepared == [0, 1, 2, 3]
    fed.close()
    assert feeding_threads() == []


def test_an_error_comes_after_the_batches_before_it():
    def batches():
        yield 1
        raise OSError("the disk is gone")

    fed = fed_ahead(batches())
    assert next(fed) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(fed)
    assert feeding_threads() == []


def test_a_reader_that_stops_early_leaves_no_thread():
    fed = fed_ahead(itertools.count())
    assert [next(fed) for _ in range(5)] == [0, 1, 2, 3, 4]
    fed.close()
    assert feeding_threads() == []


def test_the_thread_prepares_on_its_readers_gpu(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: entered.append((gpu, threading.current_thread().name)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for device in (torch.device("cuda", 1), torch.device("cuda"), torch.device("cpu")):
        assert list(fed_ahead(iter([1]), device)) == [1]
    assert entered == [(1, "feeding"), (2, "feeding")]
