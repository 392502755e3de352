"""The service's own attention: time that it slept through counts against nobody.

A service that was stopped, or starved of its core, has heard nothing meanwhile. Leases and deadlines are judged on a
clock that stands still for as long: ranks get that time back.
"""

from __future__ import annotations

TICK_S = 0.1  # how late a deadline may be noticed
_INATTENTIVE_S = 0.5  # ticks further apart than this: the service was not there


class SuspendAwareClock:
    """A clock that runs only while the service looks.

    Args:
        now: seconds, on a clock that never goes back.
    """

    def __init__(self, now: float) -> None:
        self._seen = now
        self._missed = 0.0

    def time(self, now: float, *, tick: bool = False) -> float:
        """The time of the core, for an event.

        Args:
            now: seconds, on the clock that never goes back.
            tick: whether this event is a tick: the service looks at everything.
        """
        away = now - self._seen
        if away > _INATTENTIVE_S:
            self._missed += away - TICK_S
        if tick or away > _INATTENTIVE_S:
            self._seen = now
        return now - self._missed
