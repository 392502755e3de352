"""What can happen to a rank's session. Connections are numbered from 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnlayer.errors import CollectiveError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.service_channel import Answer

Requests = Sequence[pb.ExchangeRequest]


@dataclass(frozen=True, slots=True)
class Begin:
    """The rank wants to join."""


@dataclass(slots=True)
class Ask:
    """The rank asks for something: a request, and the parts of its payload."""

    requests: Requests


@dataclass(frozen=True, slots=True)
class Joined:
    """All ranks have joined; or this one has, again.

    Attributes:
        durable: whether the service keeps its jobs on disk.
        rank, world_size: in an elastic job, where the service chooses them; None elsewhere.
    """

    connection: int
    generation: int
    durable: bool
    rank: int | None = None
    world_size: int | None = None


@dataclass(frozen=True, slots=True)
class Repeated:
    """What a `Repeat` names was sent."""

    connection: int


@dataclass(slots=True)
class Received:
    """An answer has arrived."""

    connection: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class OwnerVersion:
    """The version of a layer that a pull or a push was answered with."""

    layer: str
    version: int


@dataclass(frozen=True, slots=True)
class ChannelBroken:
    """Requests and answers can't travel on a connection any more; why it ends is not known yet."""

    connection: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection has ended, and the service did not say why.

    Attributes:
        code, text: what is known of it; the code of an end without an error is "OK".
        jitter: from 0 to 1, drawn at random: ranks that lost their service together don't come back together.
    """

    connection: int
    code: str
    text: str
    jitter: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A connection has ended, for the reason that the service gave."""

    connection: int
    error: CollectiveError


@dataclass(frozen=True, slots=True)
class Probed:
    """Whether somebody listens at the service's address."""

    listens: bool


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The time of a `Pause` has passed."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The rank has waited for `answer_within`, or until its goodbye's `answer_by`."""


@dataclass(frozen=True, slots=True)
class Leave:
    """The rank wants to leave: "" for a clean end, otherwise what failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """The rank ends the session without a goodbye."""


@dataclass(frozen=True, slots=True)
class Forked:
    """This process is a child of the rank's, and must not speak for it."""

    pid: int


Event = (
    Begin
    | Ask
    | Joined
    | Repeated
    | Received
    | OwnerVersion
    | ChannelBroken
    | Disconnected
    | Refused
    | Probed
    | PauseOver
    | TimedOut
    | Leave
    | Abandon
    | Forked
)
