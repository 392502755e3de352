"""A clock that does not count the time in which the service itself was suspended.

A service that was stopped, or starved of its core, received nothing meanwhile. Leases and deadlines are measured on a
clock that stands still for as long, so that no rank is declared lost for the service's own pause.
"""

from __future__ import annotations

TICK_S = 0.1  # how late a deadline may be noticed
_INATTENTIVE_S = 0.5  # ticks further apart than this: the service was suspended


class SuspendAwareClock:
    """A clock that runs only while the service does.

    Args:
        now: seconds, on a clock that never goes back.
    """

    def __init__(self, now: float) -> None:
        self._seen = now
        self._missed = 0.0

    def time(self, now: float, *, tick: bool = False) -> float:
        """The core's time for an event.

        Args:
            now: seconds, on the clock that never goes back.
            tick: whether this event is a tick, at which all deadlines are checked.
        """
        away = now - self._seen
        if away > _INATTENTIVE_S:
            self._missed += away - TICK_S
        if tick or away > _INATTENTIVE_S:
            self._seen = now
        return now - self._missed
