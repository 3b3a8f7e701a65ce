"""The meter: when nothing is in flight."""

from __future__ import annotations

from lorelei.rollout.meter import Meter


def test_time_without_a_request_is_idle() -> None:
    now = [10.0]
    meter = Meter(clock=lambda: now[0])
    now[0] = 12.0
    with meter.busy():
        now[0] = 15.0
        with meter.busy():
            now[0] = 16.0
        now[0] = 17.0
    now[0] = 21.0
    assert meter.lap() == 2.0 + 4.0
    now[0] = 22.0
    assert meter.lap() == 1.0, "a lap ends where the next one starts"


def test_a_request_that_fails_is_over() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    try:
        with meter.busy():
            now[0] = 3.0
            raise KeyError
    except KeyError:
        now[0] = 5.0
    assert meter.lap() == 2.0


def test_a_lap_in_the_midst_of_a_request_is_not_idle() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    with meter.busy():
        now[0] = 3.0
        assert meter.lap() == 0.0
        now[0] = 4.0
    now[0] = 6.0
    assert meter.lap() == 2.0
