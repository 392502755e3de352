"""The kinds of error that a rank can get, by the wire's names."""

from __future__ import annotations

from enum import StrEnum

from bnlayer.errors import CollectiveError, MismatchError, PeerLostError, StallError


class Reason(StrEnum):
    """Why a rank is refused or gets an error; the names are the wire's."""

    MISMATCH = "MISMATCH"
    STALL = "STALL"
    PEER_LOST = "PEER_LOST"
    DEADLINE = "DEADLINE"
    INVALID = "INVALID"
    STOPPING = "STOPPING"
    STALE = "STALE_GENERATION"
    QUOTA = "QUOTA"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"
    REGROUP = "REGROUP"
    FINISHED = "FINISHED"


REASON_OF: dict[type[CollectiveError], Reason] = {
    MismatchError: Reason.MISMATCH,
    StallError: Reason.STALL,
    PeerLostError: Reason.PEER_LOST,
}
