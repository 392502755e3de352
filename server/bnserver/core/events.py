"""Events: everything that can happen to the service.

A connection is one rank's gRPC stream and what is attached to it, named by a number that is never used again.
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
from bnserver.core.reasons import Reason

Limbs = NDArray[np.int64]
Arrays = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Replacing:
    """The limbs of a contribution, and the state from which the exchange begins, which all ranks have set by hand."""

    limbs: Limbs
    state: LayerState


Body = Limbs | Replacing | LayerState | Arrays | None
"""The numbers of a contribution: limbs of sums and probes, the state of an enrolment, the arrays of a plain
reduction or of a broadcast's root; None for a barrier and for those that a broadcast reaches."""


@dataclass(frozen=True, slots=True)
class Resume:
    """How far a reconnecting rank had come.

    Attributes:
        generation: the one that it is in.
        answered: the last contribution that was answered.
        layer_answered: the last answered contribution that belonged to a layer.
        versions: the owner's version of each layer, as of the last answer.
    """

    generation: int
    answered: int
    layer_answered: int
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Elastic:
    """How many ranks a job may have, where that is not fixed.

    Attributes:
        minimum, maximum: of ranks.
    """

    minimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}"


@dataclass(frozen=True, slots=True)
class Join:
    """A rank joins a job, or reconnects to it.

    Attributes:
        connection: its connection's number.
        job: the job's name.
        peer: the rank, and where it runs.
        world_size: how many ranks the job has, as this rank was configured.
        join_timeout: seconds that it waits for the others to join.
        timeout: seconds that it waits for the others in one exchange.
        incarnation: a random number of its process, which identifies it on reconnect; 0: it does not reconnect.
        resume: how far it had come, if all ranks had joined before its connection broke.
        elastic: how many ranks the job may have, as this rank was configured; None: `world_size`.
        previous_generation: in an elastic job: the generation that this rank was in; 0: it is new.
        restarted: likewise: whether it was started in place of one that was lost.
    """

    connection: int
    job: str
    peer: Peer
    world_size: int
    join_timeout: float
    timeout: float
    incarnation: int = 0
    resume: Resume | None = None
    elastic: Elastic | None = None
    previous_generation: int = 0
    restarted: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Contribute:
    """A rank takes part in an operation.

    Attributes:
        connection: its connection's number.
        generation: the one that it sent with the contribution.
        sequence: the number of this contribution within the generation, from 1.
        call: key and signature.
        body: its arrays.
    """

    connection: int
    generation: int
    sequence: int
    call: Call
    body: Body


@dataclass(frozen=True, slots=True)
class Pull:
    """A rank asks for the owner's state of a layer."""

    connection: int
    layer: str


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """A rank replaces the owner's state of a layer.

    Attributes:
        connection: its connection's number.
        layer: the layer's name.
        state: the new one.
        number: of this push among those of the rank, from 1; 0: it is never repeated.
    """

    connection: int
    layer: str
    state: LayerState
    number: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """A rank leaves; `reason` is empty for a clean end."""

    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's sign of life, sent as a call of its own beside its connection."""

    job: str
    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class ConnectionEnded:
    """A connection ended without a leave."""

    connection: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A connection sent an invalid message, or one that exceeds a quota.

    Attributes:
        connection: its connection's number.
        text: what was expected, and what was received.
        call: the contribution that it would have been, as far as it could be read.
        reason: INVALID, or QUOTA: it asks for more than is permitted.
    """

    connection: int
    text: str
    call: Call | None = None
    reason: Reason = Reason.INVALID


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The service shuts down."""


Event = Join | Contribute | Pull | Push | Leave | Heartbeat | ConnectionEnded | Malformed | Tick | Stop
