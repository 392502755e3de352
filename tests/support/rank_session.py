"""A rank's session in any of its states, and what it is asked and answered."""

from __future__ import annotations

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.service_channel import Answer
from bnworker.transports.service.session import Session, State

JOIN = pb.Join(job="j", rank=1, world_size=2, incarnation=7)
LEFT = "This rank has left its job: join anew."
OWNED = Answer(pb.ExchangeResponse(boot_id=5, owned=pb.Owned()), b"")


def fresh(timeout: float = 300.0) -> Session:
    """A session that has not begun."""
    return Session("h:1", JOIN, timeout, 0.0)


def active(timeout: float = 300.0, *, durable: bool = True) -> Session:
    """In generation 3, on connection 1."""
    session = fresh(timeout)
    session.handle(happened.Begin(), 0.0)
    assert session.handle(happened.Joined(1, 3, durable=durable), 0.0) == [do.Wake()]
    return session


def away(**options: bool) -> Session:
    """One whose connection broke."""
    session = active(**options)
    disconnect(session, 0.0)
    return session


def in_state(state: State) -> Session:
    """A session in a state."""
    match state:
        case State.CONNECTING:
            session = fresh()
            session.handle(happened.Begin(), 0.0)
            disconnect(session, 0.0)
        case State.JOINING:
            session = fresh()
            session.handle(happened.Begin(), 0.0)
        case State.ACTIVE:
            session = active()
        case State.AWAY:
            session = away()
        case State.LEAVING:
            session = away()
            session.handle(happened.Leave(""), 0.0)
        case _:
            session = active()
            session.handle(happened.Abandon(), 0.0)
    assert session.state is state
    return session


def disconnect(session: Session, now: float, connection: int = 1, code: str = "UNAVAILABLE") -> list[do.Action]:
    """The session's connection ends."""
    return session.handle(happened.Disconnected(connection, code, "x", 1.0), now)


def contribution(sequence: int, layer: str | None = None) -> list[pb.ExchangeRequest]:
    """A contribution in two parts."""
    contribution = pb.Contribution(sequence=sequence, layer=layer)
    return [pb.ExchangeRequest(contribution=contribution), pb.ExchangeRequest(part=pb.Part(data=b"x"))]


def pull(layer: str = "a") -> list[pb.ExchangeRequest]:
    """A request for the owner's state of a layer."""
    return [pb.ExchangeRequest(pull=pb.Pull(layer=layer))]


def result(sequence: int, version: int | None = None) -> Answer:
    """The answer to a contribution."""
    return Answer(pb.ExchangeResponse(boot_id=5, result=pb.Result(sequence=sequence, version=version)), b"")


def exchange(session: Session, sequence: int, layer: str | None = None, version: int | None = None) -> None:
    """One exchange on connection 1."""
    asked = contribution(sequence, layer)
    assert session.handle(happened.Ask(asked), 0.0) == [do.Send(1, asked)]
    answer = result(sequence, version)
    assert session.handle(happened.Received(1, answer), 0.0) == [do.Deliver(answer)]


def reconnect(session: Session, connection: int) -> tuple[pb.Join, list[pb.ExchangeRequest]]:
    """The rank comes back: what it joins with, and what it repeats."""
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert opened.connection == connection
    warning, *rest = session.handle(happened.Joined(connection, 3, durable=True), 0.0)
    assert warning == do.Warn("rank 1 is back at the service at h:1")
    repeated = [request for action in rest if isinstance(action, do.Repeat) for request in action.requests]
    return opened.requests[0].join, repeated
