"""When a rank last called, and when it got the error: the time an error takes is counted from the last rank's call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnlayer import CollectiveError
from bnworker.transports import Transport

FAILURE_WITHIN_S = 1.0  # the promise: so long after the last rank's call, every rank has its error
_SPEAKING = ("enroll", "exchange", "reduce", "broadcast", "barrier", "leave")


@dataclass
class Watch:
    """One rank's moments, on the machine's monotonic clock.

    Attributes:
        contributed_at: when it began its latest exchange, or left, before any error.
        failed_at: when its first error was raised; None: never.
    """

    contributed_at: float = 0.0
    failed_at: float | None = None


def watch(transport: Transport) -> Watch:
    """Take the time of all that goes through a transport from now on."""
    seen = Watch()
    for name in _SPEAKING:
        setattr(transport, name, _timed(getattr(transport, name), seen))
    return seen


def _timed(action: Callable[..., Any], seen: Watch) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        if seen.failed_at is None:
            seen.contributed_at = time.monotonic()
        try:
            return action(*arguments)
        except CollectiveError:
            seen.failed_at = time.monotonic() if seen.failed_at is None else seen.failed_at
            raise

    return timed


def latency(ranks: Sequence[Watch]) -> float:
    """How long after the last rank spoke the last one was told."""
    failed_at = [rank.failed_at for rank in ranks if rank.failed_at is not None]
    return max(failed_at) - max(rank.contributed_at for rank in ranks)
