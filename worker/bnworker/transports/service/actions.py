"""What a rank's session wants done."""

from __future__ import annotations

from dataclasses import dataclass

from bnworker.transports.service.events import Requests
from bnworker.transports.service.service_channel import Answer


@dataclass(frozen=True, slots=True)
class Open:
    """Open a connection, and send these requests on its stream."""

    connection: int
    requests: Requests


@dataclass(slots=True)
class Send:
    """Send requests on a connection's channel."""

    connection: int
    requests: Requests


@dataclass(frozen=True, slots=True)
class SendOnStream:
    """Send requests on a connection's stream, behind its join: the goodbye, which nothing holds up there."""

    connection: int
    requests: Requests


@dataclass(frozen=True, slots=True)
class Repeat:
    """Send requests on a connection's channel, and say so with `Repeated`: what follows must come behind them."""

    connection: int
    requests: Requests


@dataclass(slots=True)
class Deliver:
    """The rank has its answer."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class CloseChannel:
    """Close a connection's channel: the service then ends the connection, and says why."""

    connection: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out whether somebody listens at the service's address."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait, before the next attempt to connect."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Warn:
    """Write to the log."""

    text: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Whoever waits looks again: the state has changed."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """End the connection, and make no more."""


Action = Open | Send | SendOnStream | Repeat | Deliver | CloseChannel | Probe | Pause | Warn | Wake | HangUp
