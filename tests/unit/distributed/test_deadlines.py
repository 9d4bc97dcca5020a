"""Which rank is late, on a clock that the test sets."""

import pytest

from laasp_ray.distributed.deadlines import FIRST_STUCK_S, SILENT_S, STUCK_S, Beat, Deadlines
from laasp_ray.distributed.places import Place

PLACES = [Place(f"node{rank}", f"10.0.0.{rank}", 1000 + rank, (), "cpu") for rank in range(3)]


class Group:
    """Ranks that beat at every look, unless they are silent; `work` is what each has done of command `command`."""

    def __init__(self, ranks=3):
        self.now = 0.0
        self.deadlines = Deadlines(clock=lambda: self.now)
        self.work, self.beats, self.silent, self.command = [0] * ranks, [0] * ranks, set(), 1
        self.look()

    def look(self):
        for rank in set(range(len(self.work))) - self.silent:
            self.beats[rank] += 1
        self.deadlines.look(
            {rank: Beat(PLACES[rank], self.beats[rank], self.command, work) for rank, work in enumerate(self.work)}
        )

    def passes(self, seconds, advance=()):
        """Looks once a second; ranks in `advance` do one piece of work a second."""
        for _ in range(int(seconds)):
            self.now += 1
            for rank in advance:
                self.work[rank] += 1
            self.look()

    @property
    def late(self):
        return {late.rank: late.reason for late in self.deadlines.late()}


def test_who_works_is_never_late():
    group = Group()
    group.passes(1000, advance=(0, 1, 2))
    assert group.late == {}


def test_a_stopped_process_is_silent_and_late_after_a_minute():
    group = Group()
    group.passes(10, advance=(0, 1, 2))
    group.silent = {1}
    group.passes(SILENT_S)
    assert group.late == {}
    group.passes(1)
    assert group.late == {1: "no heartbeat for 61 s"}
    assert [str(late) for late in group.deadlines.late()] == [
        "rank 1, process 1001 on 10.0.0.1 (cpu): no heartbeat for 61 s"
    ]


def test_of_ranks_that_stand_still_the_one_that_has_done_least_is_late():
    group = Group()
    group.passes(20, advance=(0, 1, 2))
    group.passes(1, advance=(0, 2))  # they wait for rank 1 in this step
    group.passes(STUCK_S)
    assert group.late == {1: "nothing done for 121 s after 20 pieces of work"}


def test_where_all_stand_at_the_same_all_are_late():
    group = Group()
    group.passes(20, advance=(0, 1, 2))
    group.passes(STUCK_S + 1)
    assert sorted(group.late) == [0, 1, 2]


@pytest.mark.parametrize(("pace", "allowed"), [(5, STUCK_S), (30, 300)])
def test_what_is_late_follows_from_the_pace_that_was_seen(pace, allowed):
    group = Group(1)
    for _ in range(20):
        group.passes(pace - 1)
        group.passes(1, advance=(0,))
    group.passes(allowed)
    assert group.late == {}
    group.passes(1)
    assert sorted(group.late) == [0]


def test_the_first_piece_of_work_of_a_command_may_take_a_quarter_of_an_hour():
    group = Group(1)
    group.passes(FIRST_STUCK_S)
    assert group.late == {}
    group.passes(1)
    assert sorted(group.late) == [0]
    group.command = 2  # which opens nothing anew, but may compile
    group.look()
    assert group.late == {}


def test_who_waits_for_a_command_need_not_work_but_has_to_beat():
    group = Group(1)
    group.command = None
    group.passes(2000)
    assert group.late == {}
    group.silent = {0}
    group.passes(SILENT_S + 1)
    assert sorted(group.late) == [0]


def test_time_in_which_nobody_looked_does_not_count():
    group = Group(1)
    group.passes(20, advance=(0,))
    group.now += 3600  # a search
    group.deadlines.restart()
    assert group.late == {}
    group.passes(STUCK_S + 1)
    assert sorted(group.late) == [0]


def test_a_successor_in_the_same_rank_begins_anew():
    group = Group(1)
    group.passes(20, advance=(0,))
    group.silent = {0}
    group.passes(SILENT_S + 1)
    assert sorted(group.late) == [0]
    group.deadlines.look({0: Beat(PLACES[1], 1, 1, 0)})
    assert group.late == {} and group.deadlines.places == [PLACES[1]]
