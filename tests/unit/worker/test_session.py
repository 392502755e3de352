"""A rank's session: what it does about each thing that can happen."""

import itertools
import types
from typing import get_args

import pytest

from bnlayer import PeerLostError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.channel import Answer, AnswerAssembler
from bnworker.transports.service.events import Event
from bnworker.transports.service.session import ImpossibleEventError, Session, State

_JOIN = pb.Join(job="j", rank=1, world_size=2, incarnation=7)
_BREAK = {"code": "UNAVAILABLE", "text": "x", "jitter": 1.0}
_LEFT = "This rank has left its job: join anew."
_KINDS: tuple[type[Event], ...] = get_args(Event)
_EXAMPLES: dict[type[Event], Event] = {
    happened.Begin: happened.Begin(),
    happened.Ask: happened.Ask([pb.ExchangeRequest(pull=pb.Pull(layer="a"))]),
    happened.Joined: happened.Joined(1, 3, durable=True),
    happened.Repeated: happened.Repeated(1),
    happened.Received: happened.Received(1, Answer(pb.ExchangeResponse(owned=pb.Owned()), b"")),
    happened.OwnerVersion: happened.OwnerVersion("a", 4),
    happened.ChannelLost: happened.ChannelLost(1),
    happened.Disconnected: happened.Disconnected(1, **_BREAK),  # type: ignore[arg-type]  # one of them is a number
    happened.Refused: happened.Refused(1, PeerLostError("rank 0 was lost")),
    happened.Probed: happened.Probed(listens=True),
    happened.PauseOver: happened.PauseOver(),
    happened.TimedOut: happened.TimedOut(),
    happened.Leave: happened.Leave(""),
    happened.Abandon: happened.Abandon(),
    happened.Forked: happened.Forked(99),
}
# Where each event may lead from each state; what is not here can't happen.
_NEXT = {
    State.CONNECTING: {
        "Begin": "JOINING",
        "PauseOver": "JOINING",
        "Probed": "CONNECTING",
        "TimedOut Abandon Forked": "CLOSED",
    },
    State.JOINING: {
        "Ask Received OwnerVersion": "JOINING",
        "Joined Repeated": "ACTIVE",
        "ChannelLost": "AWAY",
        "Disconnected": "CONNECTING",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.ACTIVE: {
        "Ask Joined Received OwnerVersion": "ACTIVE",
        "ChannelLost Disconnected": "AWAY",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.AWAY: {
        "Ask Joined Repeated Received OwnerVersion ChannelLost Disconnected Probed": "AWAY",
        "PauseOver": "JOINING",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.LEAVING: {
        "Ask Joined Repeated Received OwnerVersion ChannelLost Disconnected Probed PauseOver Leave TimedOut": "LEAVING",
        "Refused Abandon Forked": "CLOSED",
    },
    State.CLOSED: {
        "Ask Joined Repeated Received OwnerVersion ChannelLost Disconnected Refused Probed PauseOver TimedOut Leave "
        "Abandon Forked": "CLOSED",
    },
}


def _fresh(timeout: float = 300.0) -> Session:
    return Session("h:1", _JOIN, timeout, 0.0)


def _active(timeout: float = 300.0, *, durable: bool = True) -> Session:
    """In generation 3, on connection 1."""
    session = _fresh(timeout)
    session.handle(happened.Begin(), 0.0)
    assert session.handle(happened.Joined(1, 3, durable=durable), 0.0) == [do.Wake()]
    return session


def _away(**options: bool) -> Session:
    session = _active(**options)
    _disconnect(session, 0.0)
    return session


def _in(state: State) -> Session:
    match state:
        case State.CONNECTING:
            session = _fresh()
            session.handle(happened.Begin(), 0.0)
            _disconnect(session, 0.0)
        case State.JOINING:
            session = _fresh()
            session.handle(happened.Begin(), 0.0)
        case State.ACTIVE:
            session = _active()
        case State.AWAY:
            session = _away()
        case State.LEAVING:
            session = _away()
            session.handle(happened.Leave(""), 0.0)
        case _:
            session = _active()
            session.handle(happened.Abandon(), 0.0)
    assert session.state is state
    return session


def _disconnect(session: Session, now: float, connection: int = 1, code: str = "UNAVAILABLE") -> list[do.Action]:
    return session.handle(happened.Disconnected(connection, code, "x", 1.0), now)


def _contribution(sequence: int, layer: str | None = None) -> list[pb.ExchangeRequest]:
    contribution = pb.Contribution(sequence=sequence, layer=layer)
    return [pb.ExchangeRequest(contribution=contribution), pb.ExchangeRequest(part=pb.Part(data=b"x"))]


def _pull(layer: str = "a") -> list[pb.ExchangeRequest]:
    return [pb.ExchangeRequest(pull=pb.Pull(layer=layer))]


def _result(sequence: int, version: int | None = None) -> Answer:
    return Answer(pb.ExchangeResponse(boot_id=5, result=pb.Result(sequence=sequence, version=version)), b"")


_OWNED = Answer(pb.ExchangeResponse(boot_id=5, owned=pb.Owned()), b"")


def _exchange(session: Session, sequence: int, layer: str | None = None, version: int | None = None) -> None:
    """One exchange on connection 1."""
    asked = _contribution(sequence, layer)
    assert session.handle(happened.Ask(asked), 0.0) == [do.Send(1, asked)]
    answer = _result(sequence, version)
    assert session.handle(happened.Received(1, answer), 0.0) == [do.Deliver(answer)]


def _return(session: Session, connection: int) -> tuple[pb.Join, list[pb.ExchangeRequest]]:
    """The rank comes back: what it joins with, and what it repeats."""
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert opened.connection == connection
    warning, *rest = session.handle(happened.Joined(connection, 3, durable=True), 0.0)
    assert warning == do.Warn("rank 1 is back at the service at h:1")
    repeated = [request for action in rest if isinstance(action, do.Repeat) for request in action.requests]
    return opened.requests[0].join, repeated


# ---- the table ----


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(State, _KINDS)))
def test_each_event_in_each_state(state: State, kind: type[Event]) -> None:
    """It leads where it should, or it can't happen."""
    session = _in(state)
    expected = {name: after for names, after in _NEXT[state].items() for name in names.split()}.get(kind.__name__)
    if expected is None:
        with pytest.raises(ImpossibleEventError, match=f"{kind.__name__} can't happen in {state.name}"):
            session.handle(_EXAMPLES[kind], 0.0)
    else:
        session.handle(_EXAMPLES[kind], 0.0)
        assert session.state.name == expected
        assert (session.error is not None) is (session.state is State.CLOSED)


def test_a_signal_handler_may_close_it_in_the_middle_of_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays closed, whatever was decided meanwhile."""
    session = _active()
    lose = Session.TABLE[State.ACTIVE][happened.ChannelLost]

    def interrupted(self: Session, event: Event, now: float) -> list[do.Action]:
        self.handle(happened.Abandon(), now)
        return lose(self, event, now)

    table = {**Session.TABLE, State.ACTIVE: {**Session.TABLE[State.ACTIVE], happened.ChannelLost: interrupted}}
    monkeypatch.setattr(Session, "TABLE", types.MappingProxyType(table))
    session.handle(happened.ChannelLost(1), 0.0)
    assert session.state is State.CLOSED


# ---- what is repeated ----


def test_before_all_have_joined_it_joins_again() -> None:
    """There is nothing to resume; the incarnation says who it is."""
    session = _fresh()
    assert session.handle(happened.Begin(), 0.0) == [do.Open(1, [pb.ExchangeRequest(join=_JOIN)])]
    assert _disconnect(session, 0.0) == [do.Pause(0.02)]
    assert session.handle(happened.PauseOver(), 0.02) == [do.Open(2, [pb.ExchangeRequest(join=_JOIN)])]


def test_it_repeats_what_waits_and_what_was_answered_last() -> None:
    """With all parts, in order; and says how far it has come, of the layers as of the rest."""
    session = _active()
    _exchange(session, 1, "a", version=4)
    session.handle(happened.OwnerVersion("b", 9), 0.0)
    _exchange(session, 2)
    session.handle(happened.Ask(_contribution(3)), 0.0)
    _disconnect(session, 0.0)
    expected = pb.Join()
    expected.CopyFrom(_JOIN)
    known = pb.Resume(generation=3, sequence=2, layer_sequence=1, versions={"a": 4, "b": 9})
    expected.resume.CopyFrom(known)
    assert _return(session, 2) == (expected, _contribution(2) + _contribution(3))
    assert not _JOIN.HasField("resume")


def test_a_pull_is_asked_again_until_it_is_answered() -> None:
    """It has no number; the contribution before it stays the last one."""
    session = _active()
    _exchange(session, 1)
    session.handle(happened.Ask(_pull()), 0.0)
    _disconnect(session, 0.0)
    assert _return(session, 2)[1] == _contribution(1) + _pull()
    session.handle(happened.Repeated(2), 0.0)
    assert session.handle(happened.Received(2, _OWNED), 0.0) == [do.Deliver(_OWNED)]
    _disconnect(session, 0.0, 2)
    assert _return(session, 3)[1] == _contribution(1)


def test_what_is_asked_while_it_repeats_comes_after_it() -> None:
    """Once; what was asked before is among what it repeats."""
    session = _away()
    session.handle(happened.Ask(_pull("a")), 0.0)
    assert _return(session, 2)[1] == _pull("a")
    assert session.handle(happened.Repeated(2), 0.0) == [do.Wake()]
    session = _active()
    _exchange(session, 1)
    _disconnect(session, 0.0)
    assert _return(session, 2)[1] == _contribution(1)
    assert session.handle(happened.Ask(_pull("a")), 0.0) == []
    assert session.handle(happened.Repeated(2), 0.0) == [do.Send(2, _pull("a")), do.Wake()]


# ---- which answers count ----


def test_an_answer_counts_once() -> None:
    """What is received twice, or for something else, is no answer to what is asked now."""
    session = _active()
    _exchange(session, 1)
    assert session.handle(happened.Received(1, _result(1)), 0.0) == []
    session.handle(happened.Ask(_contribution(2)), 0.0)
    assert session.handle(happened.Received(1, _result(1)), 0.0) == []
    assert session.handle(happened.Received(1, _OWNED), 0.0) == []
    assert session.answered == 1


def test_an_answer_counts_on_the_connection_that_is_current() -> None:
    """Answers to pulls carry no number: the one in hand was taken for that to the next pull, of another layer."""
    session = _active()
    session.handle(happened.Ask(_pull("a")), 0.0)
    _disconnect(session, 0.0)
    assert session.handle(happened.Received(1, _OWNED), 0.0) == []
    assert _return(session, 2)[1] == _pull("a")
    assert session.handle(happened.Received(1, _OWNED), 0.0) == []
    session.handle(happened.Repeated(2), 0.0)
    assert session.handle(happened.Received(1, _OWNED), 0.0) == []
    assert session.handle(happened.Received(2, _OWNED), 0.0) == [do.Deliver(_OWNED)]


def test_an_answer_to_what_was_not_asked_ends_it() -> None:
    """The ranks are out of step: an exchange of this one was interrupted."""
    session = _active()
    session.handle(happened.Ask(_contribution(1)), 0.0)
    assert session.handle(happened.Received(1, _result(2)), 0.0) == [do.HangUp()]
    assert str(session.error).startswith("The service at h:1 answered contribution 2, expected an answer to 1. An ")


# ---- outages ----


def test_pauses_grow_and_differ_between_ranks() -> None:
    """From 0.02 s to 0.5 s; half of each is drawn at random. A connection that was of use begins anew."""
    session = _active()
    pauses = []
    now = 0.0
    for connection in range(1, 9):
        *_, pause = session.handle(happened.Disconnected(connection, "UNAVAILABLE", "x", connection % 2), now)
        assert isinstance(pause, do.Pause)
        pauses.append(pause.seconds)
        now += pause.seconds
        session.handle(happened.PauseOver(), now)
    assert pauses == [0.02, 0.02, 0.08, 0.08, 0.32, 0.25, 0.5, 0.25]
    session.handle(happened.Joined(9, 3, durable=True), now)
    assert _disconnect(session, now, 9)[-1] == do.Pause(0.02)


def test_it_says_what_it_waits_for_once_an_outage() -> None:
    """At once where it was in a job; after 2 s where it has not found the service yet."""
    broke = "rank 1: the connection to the service at h:1 broke (UNAVAILABLE: x); trying for 300 s to come back"
    session = _active()
    assert _disconnect(session, 0.0) == [do.Warn(broke), do.Pause(0.02)]
    session.handle(happened.PauseOver(), 0.0)
    assert _disconnect(session, 0.0, 2) == [do.Pause(0.04)]
    session = _in(State.JOINING)
    assert _disconnect(session, 1.9) == [do.Pause(0.02)]
    session.handle(happened.PauseOver(), 1.9)
    late = "nobody listens at h:1 yet; trying until 300 s have passed (timeout=)"
    assert _disconnect(session, 2.0, 2) == [do.Warn(late), do.Pause(0.04)]


@pytest.mark.parametrize(
    ("joined", "text"),
    [
        (
            False,
            "No statistics service could be reached at h:1 within 5 s. Check the address, and that the service runs",
        ),
        (True, "The connection to the service at h:1 broke, and could not be made anew within 5 s (UNAVAILABLE: x). "),
    ],
)
def test_it_gives_up_after_its_timeout(joined: bool, text: str) -> None:
    """The last pause is as long as what is left; then the error says what is known."""
    session = _fresh(5.0)
    session.handle(happened.Begin(), 0.0)
    if joined:
        session.handle(happened.Joined(1, 3, durable=True), 0.0)
    _disconnect(session, 0.0)
    session.handle(happened.PauseOver(), 0.0)
    assert _disconnect(session, 4.99, 2)[-1] == do.Pause(5.0 - 4.99)
    session.handle(happened.PauseOver(), 5.0)
    assert _disconnect(session, 5.0, 3) == [do.HangUp()]
    assert session.state is State.CLOSED
    assert str(session.error).startswith(text)


def test_a_service_that_keeps_nothing_is_not_waited_for_once_nobody_listens() -> None:
    """There is nothing to come back to; half a second is for one that is cut off for a moment."""
    session = _active(durable=False)
    assert _disconnect(session, 10.0)[-1] == do.Pause(0.02)
    session.handle(happened.PauseOver(), 10.1)
    assert _disconnect(session, 10.5, 2) == [do.Probe()]
    assert session.handle(happened.Probed(listens=True), 10.5) == [do.Pause(0.04)]
    session.handle(happened.PauseOver(), 10.6)
    assert _disconnect(session, 10.6, 3) == [do.Probe()]
    assert session.handle(happened.Probed(listens=False), 10.6) == [do.HangUp()]
    assert "could not be made anew within 0.5 s (UNAVAILABLE: x)" in str(session.error)


def test_a_local_socket_that_ends_is_closed_and_the_reason_waited_for() -> None:
    """The service ends the connection then, and may say why."""
    session = _active()
    assert session.handle(happened.ChannelLost(1), 0.0) == [do.CloseChannel(1)]
    assert session.handle(happened.Ask(_pull()), 0.0) == []
    assert session.handle(happened.Refused(1, PeerLostError("rank 0 was lost")), 0.0) == [do.HangUp()]
    assert isinstance(session.error, PeerLostError)


def test_a_late_answer_ends_it() -> None:
    """The service ends a wait at the deadline, and has one second more to say so."""
    session = _active(5.0)
    assert session.answer_within == 6.0
    assert session.handle(happened.TimedOut(), 6.0) == [do.HangUp()]
    assert str(session.error).startswith("The service at h:1 did not answer within 5 s. It may be frozen or cut off;")


# ---- goodbyes ----


def _leave(reason: str = "") -> list[pb.ExchangeRequest]:
    return [pb.ExchangeRequest(leave=pb.Leave(reason=reason))]


def test_a_goodbye_replaces_an_interrupted_request() -> None:
    """On the stream, which nothing holds up; an answer that still comes is not taken for the goodbye's."""
    session = _active()
    session.handle(happened.Ask(_contribution(1)), 0.0)
    assert session.handle(happened.Leave("x"), 0.0) == [do.SendOnStream(1, _leave("x"))]
    assert session.handle(happened.Received(1, _result(1)), 0.0) == []
    assert session.state is State.LEAVING
    assert _disconnect(session, 0.0, code="OK") == [do.HangUp()]
    assert str(session.error) == _LEFT


def test_a_goodbye_in_an_outage_comes_with_what_others_may_lack() -> None:
    """Beside the next join, and with the one after it again, until the service has ended the stream."""
    session = _active()
    _exchange(session, 1)
    _disconnect(session, 0.0)
    assert session.handle(happened.Leave(""), 0.0) == []
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert list(opened.requests[1:]) == _contribution(1) + _leave()
    assert _disconnect(session, 0.0, 2)[-1] == do.Pause(0.04)
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert session.handle(happened.Joined(3, 3, durable=True), 0.0) == [do.Warn("rank 1 is back at the service at h:1")]
    assert _disconnect(session, 0.0, 3, "OK") == [do.HangUp()]


def test_a_goodbye_while_it_comes_back_follows_the_join() -> None:
    """The service has the join already."""
    session = _active()
    _exchange(session, 1)
    _disconnect(session, 0.0)
    session.handle(happened.PauseOver(), 0.0)
    assert session.handle(happened.Leave(""), 0.0) == [do.SendOnStream(2, _contribution(1) + _leave())]


def test_the_end_of_a_connection_without_the_goodbye_is_no_answer_to_it() -> None:
    """Its local socket had broken, so the service ended it: the goodbye comes on the next one."""
    session = _active()
    session.handle(happened.ChannelLost(1), 0.0)
    session.handle(happened.Leave(""), 0.0)
    assert _disconnect(session, 0.0, code="OK")[-1] == do.Pause(0.02)
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert list(opened.requests[1:]) == _leave()


@pytest.mark.parametrize(
    ("away", "durable", "until"), [(False, True, 2.0), (True, False, 2.0), (True, True, 20.0), (False, False, 2.0)]
)
def test_how_long_a_goodbye_may_take(away: bool, durable: bool, until: float) -> None:
    """Longer where the service is away and will be back: others may lack what only this rank can repeat."""
    session = _active(durable=durable)
    if away:
        _disconnect(session, 0.0)
    session.handle(happened.Leave(""), 0.0)
    now = 0.0
    while session.state is State.LEAVING:
        now = session.leave_by
        session.handle(happened.TimedOut(), now)
    assert now == until
    assert str(session.error) == _LEFT


def test_a_forked_child_does_nothing() -> None:
    """The connection is its parent's."""
    session = _active()
    assert session.handle(happened.Forked(99), 0.0) == []
    assert str(session.error).startswith("Process 99 was forked from rank 1, which has joined its job: a rank is one ")
    assert session.handle(happened.Leave(""), 0.0) == []
    assert session.handle(happened.Abandon(), 0.0) == []


# ---- answers in parts ----


def test_an_answer_is_put_together_from_its_parts() -> None:
    """The first message says how many bytes there are."""
    assembler = AnswerAssembler()
    first = pb.ExchangeResponse(result=pb.Result(sequence=1, payload=pb.Payload(data=b"ab", size=5)))
    assert assembler.add(first) is None
    assert assembler.add(pb.ExchangeResponse(part=pb.Part(data=b"cd"))) is None
    answer = assembler.add(pb.ExchangeResponse(part=pb.Part(data=b"e")))
    assert answer is not None
    assert (answer.response, bytes(answer.data)) == (first, b"abcde")


def test_in_an_elastic_job_it_comes_back_under_the_rank_that_it_was_given() -> None:
    """The service chooses rank and world size; one that does not know elastic jobs chooses none, and is refused."""
    join = pb.Join(job="j", rank=5, world_size=6, elastic=pb.Elastic(min=1, max=9))
    session = Session("h:1", join, 300.0, 0.0)
    session.handle(happened.Begin(), 0.0)
    session.handle(happened.Joined(1, 3, durable=True, rank=2, world_size=4), 0.0)
    _disconnect(session, 1.0)
    (opened,) = session.handle(happened.PauseOver(), 1.1)
    assert isinstance(opened, do.Open)
    again = opened.requests[0].join
    assert (again.rank, again.world_size, again.elastic.max, again.resume.generation) == (2, 4, 9, 3)
    older = Session("h:1", join, 300.0, 0.0)
    older.handle(happened.Begin(), 0.0)
    assert older.handle(happened.Joined(1, 3, durable=True), 0.0) == [do.HangUp()]
    assert str(older.error).startswith("The service at h:1 does not know elastic jobs: use a newer one")
