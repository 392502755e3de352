"""What can happen to the service.

A stream is one rank's connection, named by a number that is never used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.agreement import Peer
from bnlayer.collective import Call
from bnlayer.state import LayerState

Limbs = NDArray[np.int64]
Arrays = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Replacing:
    """The limbs of sums and probes, and the state from which the exchange begins: all ranks have set it."""

    limbs: Limbs
    state: LayerState


Body = Limbs | Replacing | LayerState | Arrays | None
"""The numbers of a contribution: limbs of sums and probes, the state of an enrolment, the arrays of a plain
reduction or of a broadcast's root; None for a barrier and for those that a broadcast reaches."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What a rank that comes back still knows.

    Attributes:
        generation: the one that it is in.
        answered: the last contribution that was answered.
        layer_answered: the last one to a layer that was.
        versions: the owner's version of each layer, as of the last answer.
    """

    generation: int
    answered: int
    layer_answered: int
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Join:
    """A rank wants its place in a job, or wants it back.

    Attributes:
        stream: its connection.
        job: the job's name.
        peer: the rank, and where it runs.
        world_size: how many ranks it believes the job has.
        join_timeout: seconds that it waits for the others to join.
        timeout: seconds that it waits for the others in one exchange.
        incarnation: the number that its process drew, by which it is known again; 0: it does not come back.
        resume: where it was, if all ranks had joined before its connection broke.
    """

    stream: int
    job: str
    peer: Peer
    world_size: int
    join_timeout: float
    timeout: float
    incarnation: int = 0
    resume: Resume | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Contribute:
    """A rank takes part in an operation.

    Attributes:
        stream: its connection.
        generation: the one it believes to be in.
        sequence: the number of this contribution within the generation, from 1.
        call: where it is and what it believes.
        body: its numbers.
    """

    stream: int
    generation: int
    sequence: int
    call: Call
    body: Body


@dataclass(frozen=True, slots=True)
class Pull:
    """A rank asks for the owner's state of a layer."""

    stream: int
    layer: str


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """A rank replaces the owner's state of a layer.

    Attributes:
        stream: its connection.
        layer: the layer's name.
        state: the new one.
        number: of this push among those of the rank, from 1; 0: it is never repeated.
    """

    stream: int
    layer: str
    state: LayerState
    number: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """A rank says goodbye; `reason` is empty for a clean end."""

    stream: int
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank is alive: said beside its stream."""

    job: str
    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A connection ended without a goodbye."""

    stream: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A connection said something that has no meaning."""

    stream: int
    text: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The service goes down."""


Event = Join | Contribute | Pull | Push | Leave | Heartbeat | Lost | Malformed | Tick | Stop
