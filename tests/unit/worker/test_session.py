"""A rank's session: where each event leads from each state, what it repeats, and which answers count."""

import itertools
import types
from typing import get_args

import pytest

from bnlayer import PeerLostError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.events import Event
from bnworker.transports.service.service_channel import Answer, AnswerAssembler
from bnworker.transports.service.session import ImpossibleEventError, Session, State
from support.rank_session import (
    JOIN,
    OWNED,
    active,
    away,
    contribution,
    disconnect,
    exchange,
    fresh,
    in_state,
    pull,
    reconnect,
    result,
)

_BREAK = {"code": "UNAVAILABLE", "text": "x", "jitter": 1.0}
_KINDS: tuple[type[Event], ...] = get_args(Event)
_EXAMPLES: dict[type[Event], Event] = {
    happened.Begin: happened.Begin(),
    happened.Ask: happened.Ask([pb.ExchangeRequest(pull=pb.Pull(layer="a"))]),
    happened.Joined: happened.Joined(1, 3, durable=True),
    happened.Repeated: happened.Repeated(1),
    happened.Received: happened.Received(1, Answer(pb.ExchangeResponse(owned=pb.Owned()), b"")),
    happened.OwnerVersion: happened.OwnerVersion("a", 4),
    happened.ChannelBroken: happened.ChannelBroken(1),
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
        "ChannelBroken": "AWAY",
        "Disconnected": "CONNECTING",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.ACTIVE: {
        "Ask Joined Received OwnerVersion": "ACTIVE",
        "ChannelBroken Disconnected": "AWAY",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.AWAY: {
        "Ask Joined Repeated Received OwnerVersion ChannelBroken Disconnected Probed": "AWAY",
        "PauseOver": "JOINING",
        "Leave": "LEAVING",
        "Refused TimedOut Abandon Forked": "CLOSED",
    },
    State.LEAVING: {
        "Ask Joined Repeated Received OwnerVersion ChannelBroken Disconnected Probed PauseOver Leave": "LEAVING",
        "TimedOut": "LEAVING",
        "Refused Abandon Forked": "CLOSED",
    },
    State.CLOSED: {
        "Ask Joined Repeated Received OwnerVersion ChannelBroken Disconnected Refused Probed PauseOver TimedOut Leave "
        "Abandon Forked": "CLOSED",
    },
}


# ---- the table ----


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(State, _KINDS)))
def test_each_event_in_each_state(state: State, kind: type[Event]) -> None:
    """It leads where it should, or it can't happen."""
    session = in_state(state)
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
    session = active()
    lose = Session.TABLE[State.ACTIVE][happened.ChannelBroken]

    def interrupted(self: Session, event: Event, now: float) -> list[do.Action]:
        self.handle(happened.Abandon(), now)
        return lose(self, event, now)

    table = {**Session.TABLE, State.ACTIVE: {**Session.TABLE[State.ACTIVE], happened.ChannelBroken: interrupted}}
    monkeypatch.setattr(Session, "TABLE", types.MappingProxyType(table))
    session.handle(happened.ChannelBroken(1), 0.0)
    assert session.state is State.CLOSED


# ---- what is repeated ----


def test_before_all_have_joined_it_joins_anew() -> None:
    """There is nothing to resume; the incarnation says who it is."""
    session = fresh()
    assert session.handle(happened.Begin(), 0.0) == [do.Open(1, [pb.ExchangeRequest(join=JOIN)])]
    assert disconnect(session, 0.0) == [do.Pause(0.02)]
    assert session.handle(happened.PauseOver(), 0.02) == [do.Open(2, [pb.ExchangeRequest(join=JOIN)])]


def test_it_repeats_what_waits_and_what_was_answered_last() -> None:
    """With all parts, in order; and says how far it has come, of the layers as of the rest."""
    session = active()
    exchange(session, 1, "a", version=4)
    session.handle(happened.OwnerVersion("b", 9), 0.0)
    exchange(session, 2)
    session.handle(happened.Ask(contribution(3)), 0.0)
    disconnect(session, 0.0)
    expected = pb.Join()
    expected.CopyFrom(JOIN)
    progress = pb.Resume(generation=3, sequence=2, layer_sequence=1, versions={"a": 4, "b": 9})
    expected.resume.CopyFrom(progress)
    assert reconnect(session, 2) == (expected, contribution(2) + contribution(3))
    assert not JOIN.HasField("resume")


def test_a_pull_is_repeated_until_it_is_answered() -> None:
    """It has no number; the contribution before it stays the last one."""
    session = active()
    exchange(session, 1)
    session.handle(happened.Ask(pull()), 0.0)
    disconnect(session, 0.0)
    assert reconnect(session, 2)[1] == contribution(1) + pull()
    session.handle(happened.Repeated(2), 0.0)
    assert session.handle(happened.Received(2, OWNED), 0.0) == [do.Deliver(OWNED)]
    disconnect(session, 0.0, 2)
    assert reconnect(session, 3)[1] == contribution(1)


def test_what_is_asked_while_it_repeats_comes_after_it() -> None:
    """Once; what was asked before is among what it repeats."""
    session = away()
    session.handle(happened.Ask(pull("a")), 0.0)
    assert reconnect(session, 2)[1] == pull("a")
    assert session.handle(happened.Repeated(2), 0.0) == [do.Wake()]
    session = active()
    exchange(session, 1)
    disconnect(session, 0.0)
    assert reconnect(session, 2)[1] == contribution(1)
    assert session.handle(happened.Ask(pull("a")), 0.0) == []
    assert session.handle(happened.Repeated(2), 0.0) == [do.Send(2, pull("a")), do.Wake()]


# ---- which answers count ----


def test_an_answer_counts_once() -> None:
    """What is received twice, or for something else, is no answer to what is asked now."""
    session = active()
    exchange(session, 1)
    assert session.handle(happened.Received(1, result(1)), 0.0) == []
    session.handle(happened.Ask(contribution(2)), 0.0)
    assert session.handle(happened.Received(1, result(1)), 0.0) == []
    assert session.handle(happened.Received(1, OWNED), 0.0) == []
    assert session.repetition.answered == 1


def test_an_answer_counts_on_the_connection_that_is_current() -> None:
    """Answers to pulls carry no number: the one in hand was taken for that to the next pull, of another layer."""
    session = active()
    session.handle(happened.Ask(pull("a")), 0.0)
    disconnect(session, 0.0)
    assert session.handle(happened.Received(1, OWNED), 0.0) == []
    assert reconnect(session, 2)[1] == pull("a")
    assert session.handle(happened.Received(1, OWNED), 0.0) == []
    session.handle(happened.Repeated(2), 0.0)
    assert session.handle(happened.Received(1, OWNED), 0.0) == []
    assert session.handle(happened.Received(2, OWNED), 0.0) == [do.Deliver(OWNED)]


def test_an_answer_to_what_was_not_asked_ends_it() -> None:
    """The ranks are out of step: an exchange of this one was interrupted."""
    session = active()
    session.handle(happened.Ask(contribution(1)), 0.0)
    assert session.handle(happened.Received(1, result(2)), 0.0) == [do.HangUp()]
    assert str(session.error).startswith("The service at h:1 answered contribution 2, expected an answer to 1. An ")


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
    disconnect(session, 1.0)
    (opened,) = session.handle(happened.PauseOver(), 1.1)
    assert isinstance(opened, do.Open)
    rejoin = opened.requests[0].join
    assert (rejoin.rank, rejoin.world_size, rejoin.elastic.max, rejoin.resume.generation) == (2, 4, 9, 3)
    older = Session("h:1", join, 300.0, 0.0)
    older.handle(happened.Begin(), 0.0)
    assert older.handle(happened.Joined(1, 3, durable=True), 0.0) == [do.HangUp()]
    assert str(older.error).startswith("The service at h:1 does not know elastic jobs: use a newer one")
