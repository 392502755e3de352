"""What the service does about it. An effect with several streams says the same to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bnlayer.errors import CollectiveError, MismatchError, PeerLostError, StallError
from bnlayer.state import LayerState
from bnserver.core.events import Arrays, Words


class Reason(StrEnum):
    """Why a rank is refused or told to give up; the names are the wire's."""

    MISMATCH = "MISMATCH"
    STALL = "STALL"
    PEER_LOST = "PEER_LOST"
    DEADLINE = "DEADLINE"
    INVALID = "INVALID"
    STOPPING = "STOPPING"
    INTERNAL = "INTERNAL"


REASON_OF: dict[type[CollectiveError], Reason] = {
    MismatchError: Reason.MISMATCH,
    StallError: Reason.STALL,
    PeerLostError: Reason.PEER_LOST,
}


@dataclass(frozen=True, slots=True)
class Joined:
    """All ranks are there."""

    streams: tuple[int, ...]
    job: str
    generation: int
    world_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """The reduced words of all ranks, and the owner's version after them."""

    streams: tuple[int, ...]
    sequence: int
    words: Words
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Enrolled:
    """The owner's state of a layer that the ranks made known."""

    streams: tuple[int, ...]
    sequence: int
    state: LayerState


@dataclass(frozen=True, slots=True, eq=False)
class Reduce:
    """A plain reduction to be computed, by `bnlayer.reduction.reduce_in_rank_order`, and sent: it may be large.

    Attributes:
        contributions: of the ranks, in rank order.
    """

    streams: tuple[int, ...]
    sequence: int
    op: str
    contributions: tuple[Arrays, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Broadcast:
    """The root's arrays for the others."""

    streams: tuple[int, ...]
    sequence: int
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class Released:
    """The operation is complete, and nothing comes back."""

    streams: tuple[int, ...]
    sequence: int


@dataclass(frozen=True, slots=True, eq=False)
class Owned:
    """The answer to a pull or a push; None: there is no such layer."""

    stream: int
    state: LayerState | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank is told why it can't go on, and its stream ends.

    Attributes:
        reason: the kind of failure.
        text: for people.
        ranks: whom it blames.
        layer, step: the exchange in which this rank waited; None if it did not.
    """

    stream: int
    reason: Reason
    text: str
    ranks: tuple[int, ...] = ()
    layer: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """The goodbye is answered, and the stream ends."""

    stream: int


@dataclass(frozen=True, slots=True)
class Persist:
    """The job's state is to be saved."""

    job: str


Effect = Joined | Totals | Enrolled | Reduce | Broadcast | Released | Owned | Failed | Closed | Persist
