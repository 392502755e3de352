"""Quotas: how much of the service one job may use, and how much all of them together.

A request that exceeds one is refused before anything is allocated for it. `Reason.QUOTA` tells a rank that it is worth
trying again later, or with the service's setting raised.
"""

from __future__ import annotations

from dataclasses import dataclass


class QuotaError(ValueError):
    """What a rank asks for exceeds a quota; the text names the quota, its limit, what was asked, and the setting."""


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """The most that is permitted.

    Attributes:
        connections: open at a time.
        jobs: in which ranks take part at a time; one that is over does not count.
        ranks: of a job.
        layers: of a job.
        channels: of a layer. A layer's work is done in the event loop: 2**17 channels take it 0.15 s.
        layer_bytes: of the states of all layers of a job.
        checkpoints: of a job.
        job_bytes: of a job's requests that are not answered yet.
        total_bytes: likewise, of all jobs. Requests that come in one message are exempt: they are small, and one job
            that fills the quota shall not end those whose exchanges are.
    """

    connections: int = 2**14
    jobs: int = 2**12
    ranks: int = 2**20
    layers: int = 2**12
    channels: int = 2**17
    layer_bytes: int = 2**28
    checkpoints: int = 100
    job_bytes: int = 2**31
    total_bytes: int = 2**33


def exceeded(quota: str, limit: int, asked: int, setting: str) -> str:
    """The text of a rank's error, without a full stop at the end.

    Args:
        quota: what is limited, with its unit.
        limit: in force.
        asked: how much it would be with this request.
        setting: of the daemon, which raises it.
    """
    return f"expected at most {limit} {quota}, received a request for {asked}; the service's {setting} raises the quota"
