"""The bytes of requests that have arrived, or begun to, and are not answered yet: by connection, by job, and in all.

What counts is what has arrived: an announcement costs nothing, and holds nothing back from others.
"""

from __future__ import annotations

from bnproto.arrays import WireError
from bnserver.core.quotas import QuotaError, Quotas, exceeded

# Of a request beside its payload. Some wait for other ranks, and a request without a payload takes memory as well.
_REQUEST_BYTES = 2**10
_OF_A_JOB, _JOB_SETTING = "bytes in flight of a job", "--max-job-bytes"
_IN_ALL = "bytes in flight of all jobs"


class BytesInFlight:
    """Of all connections; `Account` changes it.

    Args:
        quotas: in force.

    Attributes:
        total: of all jobs.
        jobs: of each job that has some.
    """

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.total = 0
        self.jobs: dict[str, int] = {}


class Account:
    """Of one connection.

    Args:
        of_all: what it is part of.

    Attributes:
        job: the one that its rank joins; "" before that.
        held: how many bytes it holds.
    """

    def __init__(self, of_all: BytesInFlight) -> None:
        self.job = ""
        self.held = 0
        self._of_all = of_all

    def add(self, count: int, announced: int | None) -> None:
        """Bytes of a request have arrived.

        Args:
            count: how many.
            announced: the size of the whole payload, with its first bytes; None with those that follow.

        Raises:
            QuotaError: the job, or all jobs together, hold too much.
            WireError: they come before the rank has joined.
        """
        if not self.job:
            raise WireError("expected one join, as the first request of a stream")
        of_all = self._of_all
        most, in_parts = of_all.quotas.job_bytes, count != announced
        if announced is not None:
            if announced > most:
                raise QuotaError(exceeded(_OF_A_JOB, most, announced, _JOB_SETTING))
            count += _REQUEST_BYTES
        of_job, total = of_all.jobs.get(self.job, 0) + count, of_all.total + count
        if of_job > most:
            raise QuotaError(exceeded(_OF_A_JOB, most, of_job, _JOB_SETTING))
        if in_parts and total > of_all.quotas.total_bytes:
            raise QuotaError(exceeded(_IN_ALL, of_all.quotas.total_bytes, total, "--max-bytes"))
        of_all.jobs[self.job], of_all.total = of_job, total
        self.held += count

    def release(self) -> None:
        """What it holds is answered, or dropped."""
        if not self.held:
            return
        of_all = self._of_all
        of_all.total -= self.held
        of_all.jobs[self.job] -= self.held
        if not of_all.jobs[self.job]:
            del of_all.jobs[self.job]
        self.held = 0
