"""What the service does about it. An effect with several streams says the same to all of them."""

from __future__ import annotations

from dataclasses import dataclass

from bnlayer.state import LayerState
from bnserver.core.events import Arrays, Limbs
from bnserver.core.journal_records import JournalRecord
from bnserver.core.reasons import Reason


@dataclass(frozen=True, slots=True)
class Joined:
    """All ranks are there."""

    streams: tuple[int, ...]
    job: str
    generation: int
    world_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """The reduced limbs of all ranks, and the owner's version after them."""

    streams: tuple[int, ...]
    sequence: int
    limbs: Limbs
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Enrolled:
    """The owner's state of a layer that the ranks made known; or that it knew, and then it is not rank 0's."""

    streams: tuple[int, ...]
    sequence: int
    state: LayerState
    known: bool = False


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
    """The stream ends: its goodbye is answered, or its rank has come back on another one."""

    stream: int


@dataclass(frozen=True, slots=True)
class Straggling:
    """Some ranks keep the others waiting: for whoever reads the log. Nobody is told, nothing ends."""

    job: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An entry of a job's past, to be written before the effects that follow are carried out."""

    job: str
    record: JournalRecord


@dataclass(frozen=True, slots=True)
class ApplyUpdate:
    """The owner's statistics of a layer are to be brought up to date, once the ranks have their answer."""

    job: str
    layer: str


@dataclass(frozen=True, slots=True)
class Persist:
    """The job is to be saved as a whole: what it is now outlives a power cut."""

    job: str


Effect = (
    Joined
    | Totals
    | Enrolled
    | Reduce
    | Broadcast
    | Released
    | Owned
    | Failed
    | Closed
    | Straggling
    | Record
    | ApplyUpdate
    | Persist
)
