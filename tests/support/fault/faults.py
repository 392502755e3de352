"""What a proxy does to a connection: a pure function of the seed, the rank, and how often the rank has connected."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Kind(StrEnum):
    """One way to break a connection; "there" is the end that the bytes go to."""

    NONE = "none"
    DELAY = "delay"  # a while of late bytes, then a reset
    CUT = "cut"  # a reset, in the middle of a message
    CLOSE = "close"  # a clean end of the connection, in the middle of a message
    HALF_CLOSE = "half-close"  # there hears that no more comes; the other way stays open
    BLACKHOLE = "blackhole"  # bytes are swallowed, while the connection stays up; a reset in the end
    LOST_REPLY = "lost-reply"  # the request was passed on; the connection ends before its reply: it is sent again


@dataclass(frozen=True)
class Fault:
    """What happens to one connection.

    Attributes:
        kind: what.
        up: to the bytes from the rank to the service; else to those from the service.
        after: how many bytes pass before.
        seconds: how long bytes are late, or swallowed.
        both: whether a blackhole swallows the other way's bytes too, from that moment on.
    """

    kind: Kind
    up: bool = True
    after: int = 0
    seconds: float = 0.0
    both: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {'up' if self.up else 'down'} after {self.after} bytes, {self.seconds:.3f} s"


HEALTHY = Fault(Kind.NONE)
FOR_EVER_S = 3600.0

_MEAN_BYTES = 16_000  # some 50 exchanges of a small layer
_EARLY_BYTES = 3_000  # what connecting, joining and enrolling take
_EARLY = 0.2  # of the connections are broken in there
_LATE_S = 0.03
# Shorter than the lease: what lasts longer is a lost rank by promise, and has a test of its own.
_SWALLOWED_S = 1.5
_KINDS = tuple(kind for kind in Kind if kind is not Kind.NONE)


def plan(seed: int, rank: int, connection: int) -> Fault:
    """What happens to a rank's connection; the first is number 0."""
    rng = np.random.default_rng([seed, rank, connection])
    kind = _KINDS[int(rng.integers(len(_KINDS)))]
    early = rng.random() < _EARLY
    after = int(rng.integers(1, _EARLY_BYTES)) if early else int(rng.exponential(_MEAN_BYTES))
    seconds = float(rng.uniform(0.0, _SWALLOWED_S if kind is Kind.BLACKHOLE else _LATE_S))
    return Fault(kind, bool(rng.integers(2)) or kind is Kind.LOST_REPLY, after, seconds)
