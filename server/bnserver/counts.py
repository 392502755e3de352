"""What the rim counts: bytes, connections, refusals, saves. What happens between ranks, the core knows (`observe`).

Counting goes on whether anybody asks or not; it adds numbers, and keeps nothing of a job that is over.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Container
from typing import NamedTuple

from bnserver.core.journal_records import Ended
from bnserver.core.waiting import Histogram

_FAILURES = 50
_TEXT_CHARACTERS = 1000


class Traffic:
    """Bytes of arrays that have travelled, on any channel; what is around them is not counted.

    Attributes:
        received, sent: seen from the service.
    """

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0


class Failure(NamedTuple):
    """A run of a job's ranks that ended with an error.

    Attributes:
        time: seconds since 1970.
        job: the job's name.
        generation: its number.
        reason: the kind of error.
        text: of the ranks' error; may be cut.
    """

    time: float
    job: str
    generation: int
    reason: str
    text: str


class Counts:
    """Of one run of the service.

    Attributes:
        handling: how long the service itself took, from the contribution that completed an operation to its answers.
        refused: calls without a place, by whose fault it was.
        failed: streams that ended with an error, by its reason.
        endings: generations that are over, by the reason of their ranks' error; "none" after a clean end.
        failures: the latest of these that were no clean ends, the last one first.
        saves, failed_saves: snapshots.
    """

    def __init__(self) -> None:
        self.handling = Histogram()
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.failures: deque[Failure] = deque(maxlen=_FAILURES)
        self.saves = 0
        self.failed_saves = 0
        self._traffic: dict[str, Traffic] = {}

    def ended(self, job: str, record: Ended) -> None:
        """A generation of a job is over."""
        self.endings[record.reason or "none"] += 1
        if record.reason is not None:
            failure = Failure(time.time(), job, record.generation, record.reason, record.text[:_TEXT_CHARACTERS])
            self.failures.appendleft(failure)

    def traffic(self, job: str) -> Traffic:
        """Of a job, for its connections."""
        return self._traffic.setdefault(job, Traffic())

    def forget(self, but: Container[str]) -> None:
        """Drop what belongs to jobs that are over.

        Args:
            but: those that are not.
        """
        for job in [job for job in self._traffic if job not in but]:
            del self._traffic[job]
