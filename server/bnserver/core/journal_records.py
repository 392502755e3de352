"""What a job's past is made of: taken in order, the entries give the job as it was.

Laws:
1. An entry is written before anybody is told of what it says.
2. Layers are written as what they were and what the ranks said since: one pure function leads from there to every
   statistic, grid and half-finished exchange, so nothing else has a form of its own on disk.
3. Plain operations leave no entry. Who lacks the answer to one asks again, and so do all others: see `generation`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnlayer.agreement import Peer
from bnlayer.collective import Call
from bnlayer.state import LayerState
from bnserver.core.events import Limbs, Replacing
from bnserver.core.reasons import Reason


@dataclass(frozen=True, slots=True, eq=False)
class LayerSnapshot:
    """A layer, as it was before its latest training call."""

    layer: str
    state: LayerState


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """A rank of a generation, and how it is known again.

    Attributes:
        peer: the rank, and where it runs.
        incarnation: the number that its process drew.
        timeout: seconds that it waits in one exchange.
        pushes: that it has made.
    """

    peer: Peer
    incarnation: int
    timeout: float
    pushes: int = 0


@dataclass(frozen=True, slots=True)
class Began:
    """All ranks of a generation have joined."""

    generation: int
    world_size: int
    members: tuple[MemberRecord, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Completed:
    """An operation on a layer is complete.

    Attributes:
        sequence: its number within the generation.
        call: what all ranks said.
        body: the reduced limbs, and the state that all ranks have set; for an enrolment, the owner's state.
        known: whether the owner had that state before, in an enrolment.
    """

    sequence: int
    call: Call
    body: Limbs | Replacing | LayerState
    known: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Pushed:
    """A rank has replaced the owner's state of a layer.

    Attributes:
        rank: which.
        number: of the push among those of this rank.
        layer: the layer's name.
        state: what it is now, with its new version.
    """

    rank: int
    number: int
    layer: str
    state: LayerState


@dataclass(frozen=True, slots=True)
class Left:
    """A rank of a generation has gone; the reason is empty for a clean end."""

    generation: int
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A generation is over.

    Attributes:
        generation: its number.
        reason: why its ranks were told to give up; None after a clean end.
        text: what they were told.
        ranks: whom it blames.
    """

    generation: int
    reason: Reason | None = None
    text: str = ""
    ranks: tuple[int, ...] = ()


JournalRecord = LayerSnapshot | Began | Completed | Pushed | Left | Ended
