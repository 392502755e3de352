"""What the rim counts: bytes, connections, refusals, saves. What happens between ranks, the core knows (`observe`).

Counting goes on whether anybody asks or not; it adds numbers, and keeps nothing of a job that is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from bnserver.core.waiting import Histogram


class Traffic:
    """Bytes of arrays that have travelled, on any channel; what is around them is not counted.

    Attributes:
        received, sent: seen from the service.
    """

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0


class Counts:
    """Of one run of the service.

    Attributes:
        handling: how long the service itself took, from the contribution that completed an operation to its answers.
        refused: calls without a place, by whose fault it was.
        failed: streams that ended with an error, by its reason.
        endings: generations that are over, by the reason of their ranks' error; "none" after a clean end.
        saves, failed_saves: snapshots.
    """

    def __init__(self) -> None:
        self.handling = Histogram()
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.saves = 0
        self.failed_saves = 0
        self._traffic: dict[str, Traffic] = {}

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
