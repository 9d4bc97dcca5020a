"""The mailbox as plain asyncio, without Ray: who is given which command, and what becomes of what is posted."""

import asyncio

import pytest

from laasp_ray.distributed.deadlines import Beat
from laasp_ray.distributed.mailbox import Command, Mailbox
from laasp_ray.distributed.places import Place

HERE = Place("node1", "10.0.0.1", 1001, (), "cpu")


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, timeout=5))


async def waits(coroutine):
    """True if the coroutine does not come to an end by itself."""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(coroutine, timeout=0.02)
    return True


def test_every_rank_is_given_the_open_command_and_then_waits_for_the_next():
    async def scenario():
        mailbox = Mailbox()
        early = asyncio.create_task(mailbox.next(-1))
        await mailbox.submit(1, "train")
        assert await early == await mailbox.next(-1) == Command(1, "train")
        assert await waits(mailbox.next(1))
        await mailbox.post(1, "epoch", "epoch 0")
        await mailbox.post(1, "done", "metrics")
        assert [await mailbox.take(), await mailbox.take()] == [("epoch", "epoch 0"), ("done", "metrics")]
        assert await waits(mailbox.next(-1))  # a rank that starts anew is not given a closed command
        await mailbox.submit(2, "again")
        assert await mailbox.next(1) == Command(2, "again")

    run(scenario())


def test_posts_about_a_closed_command_are_dropped_and_a_complaint_closes_none():
    async def scenario():
        mailbox = Mailbox()
        await mailbox.submit(1, "train")
        await mailbox.post(1, "complaint", "rank 1: KeyError: once")
        await mailbox.post(1, "failed", "an error")
        await mailbox.post(1, "done", "too late")
        assert [await mailbox.take(), await mailbox.take()] == [
            ("complaint", "rank 1: KeyError: once"),
            ("failed", "an error"),
        ]
        assert await waits(mailbox.take())

    run(scenario())


def test_heartbeats_are_counted_for_each_rank():
    async def scenario():
        mailbox = Mailbox()
        await mailbox.beat(0, HERE, None, 0)
        await mailbox.beat(0, HERE, 1, 7)
        await mailbox.beat(1, HERE, 1, 6)
        assert await mailbox.beats() == {0: Beat(HERE, 2, 1, 7), 1: Beat(HERE, 1, 1, 6)}

    run(scenario())


def test_stopping_sends_everyone_home():
    async def scenario():
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.next(-1))
        await asyncio.sleep(0)
        await mailbox.stop()
        assert await waiting is None
        assert await mailbox.next(-1) is None

    run(scenario())
