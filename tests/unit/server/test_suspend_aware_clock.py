"""Time in which the service was suspended does not count towards leases and deadlines."""

import pytest

from bnserver.core.suspend_aware_clock import TICK_S, SuspendAwareClock


def test_while_it_looks_time_is_time() -> None:
    """Ticks that come a little late are no sleep: a lease of 5 s is one of 5 s."""
    clock = SuspendAwareClock(100.0)
    for number in range(1, 21):
        assert clock.time(100.0 + number * 0.4, tick=True) == pytest.approx(100.0 + number * 0.4)


def test_a_sleep_is_as_short_as_a_tick() -> None:
    """However long it was."""
    clock = SuspendAwareClock(0.0)
    for tick in (0.1, 0.2, 0.3):
        clock.time(tick, tick=True)
    assert clock.time(1000.3, tick=True) == pytest.approx(0.3 + TICK_S)
    assert clock.time(1000.5, tick=True) == pytest.approx(0.5 + TICK_S)


def test_whatever_comes_first_after_a_sleep_is_excused() -> None:
    """A request that waited meanwhile may be read before the first tick."""
    clock = SuspendAwareClock(0.0)
    assert clock.time(60.0) == pytest.approx(TICK_S)
    assert clock.time(60.0, tick=True) == pytest.approx(TICK_S)


def test_requests_are_no_ticks() -> None:
    """A service that reads, but never looks at the time, was not attentive."""
    clock = SuspendAwareClock(0.0)
    for number in range(1, 5):
        clock.time(number / 10)
    assert clock.time(0.6) == pytest.approx(TICK_S)
