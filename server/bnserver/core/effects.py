"""Effects: what the service is to do after an event.

Connections are named by their numbers, as in the events. An effect with several of them sends the same to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnlayer.state import LayerState
from bnserver.core.events import Arrays, Limbs
from bnserver.core.journal_records import JournalRecord
from bnserver.core.reasons import Reason


@dataclass(frozen=True, slots=True)
class Joined:
    """All ranks have joined.

    Attributes:
        rank: of the only connection, in an elastic job, where the service chooses the ranks; None elsewhere.
    """

    connections: tuple[int, ...]
    job: str
    generation: int
    world_size: int
    rank: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """The reduced limbs of all ranks, and the owner's version after them."""

    connections: tuple[int, ...]
    sequence: int
    limbs: Limbs
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Enrolled:
    """The owner's state of an enrolled layer: rank 0's, or the one that the owner had before."""

    connections: tuple[int, ...]
    sequence: int
    state: LayerState
    known: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Reduce:
    """A plain reduction to be computed, by `bnlayer.reduction.reduce_in_rank_order`, and sent: it may be large.

    Attributes:
        contributions: of the ranks, in rank order.
    """

    connections: tuple[int, ...]
    sequence: int
    op: str
    contributions: tuple[Arrays, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Broadcast:
    """The root's arrays for the others."""

    connections: tuple[int, ...]
    sequence: int
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class Released:
    """The operation is complete and returns no data."""

    connections: tuple[int, ...]
    sequence: int


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A job's layers are to be kept under a name; the ranks get their answer once they are on disk, or can't be.

    Attributes:
        job: whose.
        name: of the checkpoint.
        step: the training step that it belongs to.
        layers: the owner's states at that moment, by layer.
    """

    connections: tuple[int, ...]
    sequence: int
    job: str
    name: str
    step: int
    layers: Mapping[str, LayerState]


@dataclass(frozen=True, slots=True, eq=False)
class Owned:
    """The answer to a pull or a push; None: there is no such layer."""

    connection: int
    state: LayerState | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank gets an error that says why it can't go on, and its connection ends.

    Attributes:
        reason: the kind of failure.
        text: for people.
        ranks: whom it blames.
        layer, step: the exchange in which this rank waited; None if it did not.
    """

    connection: int
    reason: Reason
    text: str
    ranks: tuple[int, ...] = ()
    layer: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection ends: its leave is answered, or its rank has reconnected on another one.

    Attributes:
        job: that the rank has left: it is answered once its saves in progress are done; "" if it has reconnected.
    """

    connection: int
    job: str = ""


@dataclass(frozen=True, slots=True)
class Straggling:
    """Some ranks keep the others waiting. It is only logged: no rank is notified, nothing ends."""

    job: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A record of a job's journal, to be written before the effects that follow are carried out."""

    job: str
    record: JournalRecord


@dataclass(frozen=True, slots=True)
class Persist:
    """The job is to be saved as a snapshot, which survives a power cut."""

    job: str


Effect = (
    Joined
    | Totals
    | Enrolled
    | Reduce
    | Broadcast
    | Released
    | Checkpoint
    | Owned
    | Failed
    | Closed
    | Straggling
    | Record
    | Persist
)
