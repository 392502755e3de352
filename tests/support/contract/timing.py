"""When a rank spoke last, and when it was told: how long an error takes is counted from the last rank to speak."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnlayer import CollectiveError
from bnworker.transports import Transport

TOLD_S = 1.0  # the promise: so long after the last rank has spoken, every rank has its error
_SPEAKING = ("enroll", "exchange", "reduce", "broadcast", "barrier", "leave")


@dataclass
class Watch:
    """One rank's moments, on the machine's monotonic clock.

    Attributes:
        spoke: when it began its latest exchange, or left, before any error.
        told: when its first error was raised; None: never.
    """

    spoke: float = 0.0
    told: float | None = None


def watch(transport: Transport) -> Watch:
    """Take the time of all that goes through a transport from now on."""
    seen = Watch()
    for name in _SPEAKING:
        setattr(transport, name, _timed(getattr(transport, name), seen))
    return seen


def _timed(action: Callable[..., Any], seen: Watch) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        if seen.told is None:
            seen.spoke = time.monotonic()
        try:
            return action(*arguments)
        except CollectiveError:
            seen.told = time.monotonic() if seen.told is None else seen.told
            raise

    return timed


def latency(ranks: Sequence[Watch]) -> float:
    """How long after the last rank spoke the last one was told."""
    told = [rank.told for rank in ranks if rank.told is not None]
    return max(told) - max(rank.spoke for rank in ranks)
