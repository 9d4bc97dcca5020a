"""The mailbox as plain asyncio, without Ray: who is given which command, and when patience ends."""

import asyncio

import pytest

from laasp_ray.distributed.mailbox import Command, Mailbox

RANK_0, RANK_1 = 0, 1


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, timeout=5))


async def waits(coroutine):
    """True if the coroutine does not come to an end by itself."""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(coroutine, timeout=0.02)
    return True


def test_every_rank_is_given_the_open_command_and_then_waits_for_the_next():
    async def scenario():
        mailbox = Mailbox(patience=2)
        early = asyncio.create_task(mailbox.next(-1, RANK_1))
        await mailbox.submit(1, "train")
        assert await early == await mailbox.next(-1, RANK_0) == Command(1, "train")
        assert await waits(mailbox.next(1, RANK_0))
        await mailbox.post(1, "done", "metrics")
        assert await mailbox.take() == ("done", "metrics")
        assert await waits(mailbox.next(-1, RANK_1))  # a rank that starts anew is not given a closed command
        await mailbox.submit(2, "again")
        assert await mailbox.next(1, RANK_0) == Command(2, "again")

    run(scenario())


def test_a_restarted_group_goes_on_from_the_last_epoch_posted():
    async def scenario():
        mailbox = Mailbox(patience=2)
        await mailbox.submit(1, "train")
        await mailbox.next(-1, RANK_0)
        await mailbox.post(1, "epoch", "epoch 0")
        assert await mailbox.next(-1, RANK_0) == Command(1, "train", resume="epoch 0")
        assert await mailbox.next(-1, RANK_1) == Command(1, "train", resume="epoch 0")

    run(scenario())


def test_posts_about_a_closed_command_are_dropped():
    async def scenario():
        mailbox = Mailbox(patience=2)
        await mailbox.submit(1, "train")
        await mailbox.post(1, "failed", "an error")
        await mailbox.post(1, "done", "too late")
        assert await mailbox.take() == ("failed", "an error")
        assert await waits(mailbox.take())

    run(scenario())


def test_an_error_that_keeps_coming_closes_the_command_with_what_it_said():
    async def scenario():
        mailbox = Mailbox(patience=2)
        await mailbox.submit(1, "train")
        await mailbox.next(-1, RANK_0)
        await mailbox.complain(1, "rank 0: KeyError: once")
        await mailbox.next(-1, RANK_0)
        await mailbox.complain(1, "rank 0: KeyError: twice")
        kind, text = await mailbox.take()
        assert kind == "failed"
        assert (
            text == "the workers were lost 2 times without finishing an epoch; the last said: rank 0: KeyError: twice"
        )
        assert await waits(mailbox.next(-1, RANK_0))

    run(scenario())


def test_workers_that_vanish_without_a_word_end_patience_too():
    async def scenario():
        mailbox = Mailbox(patience=1)
        await mailbox.submit(1, "train")
        await mailbox.next(-1, RANK_0)
        third = asyncio.create_task(mailbox.next(-1, RANK_0))
        assert await mailbox.take() == (
            "failed",
            "the workers were lost once without finishing an epoch; the last said: nothing",
        )
        third.cancel()

    run(scenario())


def test_a_finished_epoch_earns_new_patience():
    async def scenario():
        mailbox = Mailbox(patience=2)
        await mailbox.submit(1, "train")
        for epoch in range(5):  # lost once after every epoch
            await mailbox.next(-1, RANK_0)
            await mailbox.post(1, "epoch", epoch)
            assert await mailbox.take() == ("epoch", epoch)
        assert (await mailbox.next(-1, RANK_0)).resume == 4

    run(scenario())


def test_stopping_sends_everyone_home():
    async def scenario():
        mailbox = Mailbox(patience=1)
        waiting = asyncio.create_task(mailbox.next(-1, RANK_0))
        await asyncio.sleep(0)
        await mailbox.stop()
        assert await waiting is None
        assert await mailbox.next(-1, RANK_1) is None

    run(scenario())
