"""What is left of a run, by a clock that the test winds."""

import pytest

from asib_jax.record.remaining import Part, Remaining, duration

PARTS = [Part("teacher1", "teacher1", 2), Part("stage1/b", "b", 3), Part("control/stage1/b", "control/b", 3)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_of_what_has_been_measured_and_says_where_something_has_not():
    clock = Clock()
    remaining = Remaining(PARTS, clock)
    assert remaining.begin(PARTS[0]) == "phase 1 of 3"
    assert remaining.text() == "8 epochs left"
    clock.now = 100.0
    remaining.epoch("teacher1")
    assert remaining.text() == "7 epochs left"  # no bound: those of the student are unknown, this one was compiled
    clock.now = 140.0
    remaining.epoch("teacher1")
    assert remaining.text() == "6 epochs left"
    assert remaining.begin(PARTS[1]) == "phase 2 of 3"
    clock.now = 190.0
    remaining.epoch("stage1/b")  # its first, with compilation
    assert remaining.text() == "5 epochs left, at most 4.2 min"  # 2 + 3 of 50 s: a control's epoch is a student's
    clock.now = 200.0
    remaining.epoch("stage1/b")
    assert remaining.text() == "4 epochs left, about 40 s"
    clock.now = 210.0
    remaining.epoch("stage1/b")
    clock.now = 300.0  # evaluation between phases belongs to none
    assert remaining.begin(PARTS[2]) == "phase 3 of 3"
    clock.now = 305.0
    remaining.epoch("control/stage1/b")
    assert remaining.text() == "2 epochs left, at most 10 s"
    remaining.epoch("control/stage1/b")
    remaining.epoch("control/stage1/b")
    assert remaining.text() == "no epoch left"


def test_a_phase_that_ended_early_leaves_nothing_and_one_that_goes_on_the_rest():
    remaining = Remaining(PARTS, lambda: 0.0)
    remaining.begin(PARTS[0])
    remaining.epoch("teacher1")  # and early stopping
    assert remaining.begin(PARTS[1], done=1) == "phase 2 of 3"
    assert remaining.text().startswith("5 epochs left")
    assert remaining.begin(Part("another", "another", 4)) == "phase 4 of 4"
    assert remaining.text().startswith("4 epochs left")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (3.21, "3.2 s"), (89, "89 s"), (90, "1.5 min"), (3600, "60 min"), (5400, "1.5 h"), (36_000, "10 h"),
     (172_800, "2 days"), (1e6, "12 days")],
)  # fmt: skip
def test_durations_have_two_figures_at_most(seconds, text):
    assert duration(seconds) == text


def test_what_is_known_bounds_the_whole_from_below():
    clock = Clock()
    remaining = Remaining([Part("stage1/a", "a", 3), Part("stage1/b", "b", 2)], clock)
    remaining.begin(Part("stage1/a", "a", 3))
    for now in (50.0, 60.0):
        clock.now = now
        remaining.epoch("stage1/a")
    assert remaining.text() == "3 epochs left, over 10 s"
