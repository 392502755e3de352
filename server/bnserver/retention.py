"""Retention: which jobs that are over are forgotten, by age and by number.

It is the operator's decision: without one, everything is kept. A job that is not over is never forgotten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnserver.core.effects import Persist
from bnserver.core.service import Service

_DAY_S = 86400.0
_LISTED = 5  # in one line of the log

_log = logging.getLogger("bnserver")


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept of jobs that are over, and how many checkpoints of each job.

    Attributes:
        days: after their end; None: for ever.
        jobs: the latest so many; None: all.
        checkpoints: of a job, the latest so many; None: all.
    """

    days: float | None = None
    jobs: int | None = None
    checkpoints: int | None = None

    @property
    def is_everything(self) -> bool:
        """Whether no job is ever forgotten."""
        return self.days is None and self.jobs is None

    def expired(self, ended: Mapping[str, float], now: float) -> list[str]:
        """Which are not kept any more, the oldest first.

        Args:
            ended: when each one ended, in seconds since 1970.
            now: likewise.
        """
        oldest_first = sorted(ended, key=lambda name: (ended[name], name))
        too_many = 0 if self.jobs is None else max(0, len(oldest_first) - self.jobs)
        return [
            name
            for position, name in enumerate(oldest_first)
            if position < too_many or (self.days is not None and now - ended[name] > self.days * _DAY_S)
        ]


class SteadyTime:
    """The time of day, but it never runs ahead: a clock that is set forward must not make jobs look old.

    Args:
        began: seconds since 1970, when it is made.
        steady: seconds at the same moment, on a clock that nobody sets.
    """

    def __init__(self, began: float, steady: float) -> None:
        self._ahead = began - steady

    def time(self, now: float, steady: float) -> float:
        """Seconds since 1970, no later than if the clock had not been set since the begin."""
        return min(now, steady + self._ahead)


class MemoryRetention:
    """Forgets jobs of a service without a state directory, which has them in memory alone.

    Args:
        keep: what is kept.
        service: whose jobs.
    """

    def __init__(self, keep: Keep, service: Service) -> None:
        self._keep = keep
        self._service = service
        self._ended: dict[str, float] = {}
        self._clock = SteadyTime(time.time(), time.monotonic())

    def persist(self, effect: Persist) -> None:
        """Note that a job may be over."""
        if not self._keep.is_everything:
            self._ended[effect.job] = self._now()

    async def expire(self) -> None:
        """Forget what is not kept any more."""
        ended = {job: since for job, since in self._ended.items() if self._service.is_over(job)}
        expired = self._keep.expired(ended, self._now())
        for job in expired:
            self._service.forget(job)
            del self._ended[job]
        log_forgotten(expired)

    def _now(self) -> float:
        return self._clock.time(time.time(), time.monotonic())


def log_forgotten(forgotten: Sequence[str]) -> None:
    """Log what was forgotten."""
    if forgotten:
        more = ", …" if len(forgotten) > _LISTED else ""
        names = ", ".join(map(repr, forgotten[:_LISTED]))
        _log.info("forgot %d jobs that are over (--keep-jobs, --keep-jobs-days): %s%s", len(forgotten), names, more)
