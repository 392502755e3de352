"""What can happen to the service.

A stream is one rank's connection, named by a number that is never used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.agreement import Peer
from bnlayer.collective import Call
from bnlayer.state import LayerState

Words = NDArray[np.int64]
Arrays = tuple[NDArray[Any], ...]
Body = Words | LayerState | Arrays | None
"""The numbers of a contribution: words of sums and probes, the state of an enrolment, the arrays of a plain
reduction or of a broadcast's root; None for a barrier and for those that a broadcast reaches."""


@dataclass(frozen=True, slots=True)
class Join:
    """A rank wants its place in a job.

    Attributes:
        stream: its connection.
        job: the job's name.
        peer: the rank, and where it runs.
        world_size: how many ranks it believes the job has.
        join_timeout: seconds that it waits for the others to join.
        timeout: seconds that it waits for the others in one exchange.
    """

    stream: int
    job: str
    peer: Peer
    world_size: int
    join_timeout: float
    timeout: float


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
    """A rank replaces the owner's state of a layer."""

    stream: int
    layer: str
    state: LayerState


@dataclass(frozen=True, slots=True)
class Leave:
    """A rank says goodbye; `reason` is empty for a clean end."""

    stream: int
    reason: str


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


Event = Join | Contribute | Pull | Push | Leave | Lost | Malformed | Tick | Stop
