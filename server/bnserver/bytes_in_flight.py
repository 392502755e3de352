"""The bytes of requests that have arrived, or begun to, and are not answered yet: by job, and in all.

What counts is what has arrived: an announcement costs nothing, and holds nothing back from others.
"""

from __future__ import annotations

from collections import Counter

from bnserver.core.quotas import QuotaError, Quotas, exceeded

# Of a request beside its payload. Some wait for other ranks, and a request without a payload takes memory as well.
_REQUEST_BYTES = 2**10


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
        self._jobs: Counter[str] = Counter()

    def begin(self, job: str, size: int, count: int) -> int:
        """A request of `size` bytes begins with `count` of them; returns what to release.

        Raises:
            QuotaError: the job, or all jobs together, hold too much.
        """
        if size > self._quotas.job_bytes:
            raise QuotaError(exceeded(_OF_A_JOB, self._quotas.job_bytes, size, _JOB_SETTING))
        return self._add(job, _REQUEST_BYTES + count, in_parts=count != size)

    def continues(self, job: str, count: int) -> int:
        """More bytes of a request; returns what to release.

        Raises:
            QuotaError: likewise.
        """
        return self._add(job, count, in_parts=True)

    def release(self, job: str, count: int) -> None:
        """So many bytes are answered, or dropped."""
        self.total -= count
        self._jobs[job] -= count
        if not self._jobs[job]:
            del self._jobs[job]

    def _add(self, job: str, count: int, *, in_parts: bool) -> int:
        of_job, total = self._jobs[job] + count, self.total + count
        if of_job > self._quotas.job_bytes:
            raise QuotaError(exceeded(_OF_A_JOB, self._quotas.job_bytes, of_job, _JOB_SETTING))
        if in_parts and total > self._quotas.total_bytes:
            raise QuotaError(exceeded(_IN_ALL, self._quotas.total_bytes, total, "--max-bytes"))
        self._jobs[job], self.total = of_job, total
        return count


_OF_A_JOB, _JOB_SETTING = "bytes in flight of a job", "--max-job-bytes"
_IN_ALL = "bytes in flight of all jobs"
