"""Where the time goes: every moment belongs to one part."""

import math

import pytest

from lckv_jax.train.clock import Clock, duration


def test_laps_add_up_to_the_wall_time():
    now = iter([10.0, 13.0, 13.5, 14.5, 14.75])
    clock = Clock(lambda: next(now))
    assert [clock.lap(part) for part in ("start", "data", "step", "data")] == [3.0, 0.5, 1.0, 0.25]
    assert clock.seconds == {"start": 3.0, "data": 0.75, "step": 1.0}
    assert list(clock.seconds) == ["start", "data", "step"]
    assert sum(clock.seconds.values()) == 14.75 - 10.0


def test_a_clock_that_is_set_back_takes_no_time_away():
    now = iter([10.0, 12.0, 5.0, 6.0])
    clock = Clock(lambda: next(now))
    assert [clock.lap("step") for _ in range(3)] == [2.0, 0.0, 1.0]
    assert clock.seconds == {"step": 3.0}


def test_the_real_clock_moves_forward():
    clock = Clock()
    assert clock.lap("step") >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (360001, "100:00:01"), (math.nan, "-:--")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
