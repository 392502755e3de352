"""The bytes of requests that have arrived, or begun to, and are not answered yet: by job, and in all.

What counts is what has arrived: an announcement costs nothing, and holds nothing back from others.
"""

from __future__ import annotations

from bnserver.core.quotas import QuotaError, Quotas, exceeded

# Of a request beside its payload. Some wait for other ranks, and a request without a payload takes memory as well.
_REQUEST_BYTES = 2**10
_OF_A_JOB, _JOB_SETTING = "bytes in flight of a job", "--max-job-bytes"
_IN_ALL = "bytes in flight of all jobs"


class BytesInFlight:
    """The account of all jobs.

    Args:
        quotas: in force.

    Attributes:
        total: of all jobs.
    """

    def __init__(self, quotas: Quotas) -> None:
        self.total = 0
        self._quotas = quotas
        self._jobs: dict[str, int] = {}

    def add(self, job: str, count: int, announced: int | None) -> int:
        """Bytes have arrived; returns what to release.

        Args:
            job: whose.
            count: how many.
            announced: the size of the whole payload, with its first bytes; None with those that follow.

        Raises:
            QuotaError: the job, or all jobs together, hold too much.
        """
        most, in_parts = self._quotas.job_bytes, count != announced
        if announced is not None:
            if announced > most:
                raise QuotaError(exceeded(_OF_A_JOB, most, announced, _JOB_SETTING))
            count += _REQUEST_BYTES
        of_job, total = self._jobs.get(job, 0) + count, self.total + count
        if of_job > most:
            raise QuotaError(exceeded(_OF_A_JOB, most, of_job, _JOB_SETTING))
        if in_parts and total > self._quotas.total_bytes:
            raise QuotaError(exceeded(_IN_ALL, self._quotas.total_bytes, total, "--max-bytes"))
        self._jobs[job], self.total = of_job, total
        return count

    def release(self, job: str, count: int) -> int:
        """So many bytes are answered, or dropped; returns how many of them are left."""
        self.total -= count
        self._jobs[job] -= count
        if not self._jobs[job]:
            del self._jobs[job]
        return 0
