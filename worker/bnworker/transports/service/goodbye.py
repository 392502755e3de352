"""Leaving a job: on which connection the leave was sent, how long its answer is waited for, what is logged without one.

How the leave is sent, and sent again, is in `session`.
"""

from __future__ import annotations

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import explanations
from bnworker.transports.service.actions import Warn

GOODBYE_S = 2.0  # how long leaving may take
# How long it may take where the answer counts: the job is on disk by then; or the service is away, and others may lack
# what only this rank can repeat.
_LONG_GOODBYE_S = 20.0


class Goodbye:
    """One rank's.

    Attributes:
        is_clean: whether the rank left without a failure.
        connection: that carried it; 0 before one has.
        answer_by: when the rank stops waiting for the answer.
    """

    def __init__(self) -> None:
        self.is_clean = False
        self.connection = 0
        self.answer_by = 0.0
        self._said_at = 0.0
        self._is_extended = False

    def say(self, reason: str, now: float) -> pb.ExchangeRequest:
        """The request with which the rank leaves.

        Args:
            reason: what failed; "" for a clean end.
            now: seconds.
        """
        self._said_at, self.is_clean = now, not reason
        self.answer_by = now + GOODBYE_S
        return pb.ExchangeRequest(leave=pb.Leave(reason=reason))

    def extend(self, timeout: float) -> bool:
        """Wait longer for an answer that counts, once; returns whether there is time for it."""
        longer = min(timeout, _LONG_GOODBYE_S) - GOODBYE_S
        if self._is_extended or longer <= 0:
            return False
        self._is_extended = True
        self.answer_by += longer
        return True

    def late(self, now: float) -> str:
        """Why it was not confirmed, if no answer came."""
        return f"no answer within {now - self._said_at:g} s"

    def unconfirmed(self, join: pb.Join, address: str, why: str, *, durable: bool) -> Warn:
        """The line of the log that says so.

        Args:
            join: who it is.
            address: of the service.
            why: what came instead of the answer.
            durable: whether the service keeps jobs on disk.
        """
        return Warn(explanations.unconfirmed(join, address, why, saves=durable and self.is_clean))
