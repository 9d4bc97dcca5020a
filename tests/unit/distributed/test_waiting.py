"""How long something is waited for, and when that is said, on a clock that the test sets."""

from laasp_ray.distributed.waiting import SAY_S, Waiting


def test_a_wait_is_said_once_in_so_many_seconds_and_begins_anew():
    now = [100.0]
    waiting = Waiting(lambda: now[0])
    said = []
    for _ in range(5):
        now[0] += SAY_S / 2 + 1
        if waiting.has_to_be_said():
            said.append(waiting.seconds)
    assert said == [62.0, 124.0]
    waiting.restart()
    assert waiting.seconds == 0 and not waiting.has_to_be_said()
    now[0] += SAY_S + 1
    assert waiting.has_to_be_said() and waiting.seconds == 61.0
