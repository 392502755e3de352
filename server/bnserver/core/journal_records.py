"""The records of a job's journal: applied in order, they restore the job.

Laws:
1. A record is written before any rank gets an answer that depends on it.
2. A layer is written as a snapshot and the reduced contributions since: one pure function computes every statistic,
   grid and half-finished exchange from them, so nothing else needs a format on disk.
3. Plain operations are not recorded. After a restart ranks repeat them: see `generation`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnlayer.agreement import Peer
from bnlayer.collective import Call
from bnlayer.state import LayerState
from bnserver.core.events import Elastic, Limbs, Replacing
from bnserver.core.reasons import Reason

NOBODY = 2**32 - 1  # no job has so many ranks


@dataclass(frozen=True, slots=True, eq=False)
class LayerSnapshot:
    """A layer, as it was before its latest training call."""

    layer: str
    state: LayerState


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """A rank of a generation, and how it is recognized on reconnect.

    Attributes:
        peer: the rank, and where it runs.
        incarnation: the random number of its process.
        timeout: seconds that it waits in one exchange.
        pushes: how many it has made.
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
    elastic: Elastic | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Completed:
    """An operation on a layer is complete.

    Attributes:
        sequence: its number within the generation.
        call: the one of all ranks.
        body: the reduced limbs, and the state that all ranks have set; for an enrolment, the owner's state.
        known: in an enrolment, whether the owner had that state before.
    """

    sequence: int
    call: Call
    body: Limbs | Replacing | LayerState
    known: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Pushed:
    """A rank has replaced the owner's state of a layer.

    Attributes:
        rank: which; `NOBODY`: none has, it is what came of records that are not kept.
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
    """A rank of a generation has left or is lost; the reason is empty for a clean end."""

    generation: int
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A generation is over.

    Attributes:
        generation: its number.
        reason: the kind of error that its ranks got; None after a clean end.
        text: of that error.
        ranks: whom it blames.
    """

    generation: int
    reason: Reason | None = None
    text: str = ""
    ranks: tuple[int, ...] = ()


JournalRecord = LayerSnapshot | Began | Completed | Pushed | Left | Ended
