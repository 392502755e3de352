"""A rank's session when the rank leaves, or was forked from one that has joined."""

import pytest

from bnlayer import ServiceError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.session import State
from support.rank_session import LEFT, active, contribution, disconnect, exchange, result


def _leave(reason: str = "") -> list[pb.ExchangeRequest]:
    return [pb.ExchangeRequest(leave=pb.Leave(reason=reason))]


def test_a_goodbye_replaces_an_interrupted_request() -> None:
    """On the stream, which nothing holds up; an answer that still comes is not taken for the goodbye's."""
    session = active()
    session.handle(happened.Ask(contribution(1)), 0.0)
    assert session.handle(happened.Leave("x"), 0.0) == [do.SendOnStream(1, _leave("x"))]
    assert session.handle(happened.Received(1, result(1)), 0.0) == []
    assert session.state is State.LEAVING
    assert disconnect(session, 0.0, code="OK") == [do.HangUp()]
    assert str(session.error) == LEFT


def test_a_goodbye_in_an_outage_comes_with_what_others_may_lack() -> None:
    """Beside the next join, and with the one after it again, until the service has ended the stream."""
    session = active()
    exchange(session, 1)
    disconnect(session, 0.0)
    assert session.handle(happened.Leave(""), 0.0) == []
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert list(opened.requests[1:]) == contribution(1) + _leave()
    assert disconnect(session, 0.0, 2)[-1] == do.Pause(0.04)
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert session.handle(happened.Joined(3, 3, durable=True), 0.0) == [do.Warn("rank 1 is back at the service at h:1")]
    assert disconnect(session, 0.0, 3, "OK") == [do.HangUp()]


def test_a_goodbye_while_it_comes_back_follows_the_join() -> None:
    """The service has the join already."""
    session = active()
    exchange(session, 1)
    disconnect(session, 0.0)
    session.handle(happened.PauseOver(), 0.0)
    assert session.handle(happened.Leave(""), 0.0) == [do.SendOnStream(2, contribution(1) + _leave())]


def test_the_end_of_a_connection_without_the_goodbye_is_no_answer_to_it() -> None:
    """Its local socket had broken, so the service ended it: the goodbye comes on the next one."""
    session = active()
    session.handle(happened.ChannelBroken(1), 0.0)
    session.handle(happened.Leave(""), 0.0)
    assert disconnect(session, 0.0, code="OK")[-1] == do.Pause(0.02)
    (opened,) = session.handle(happened.PauseOver(), 0.0)
    assert isinstance(opened, do.Open)
    assert list(opened.requests[1:]) == _leave()


@pytest.mark.parametrize(
    ("away", "durable", "reason", "until", "what"),
    [
        (False, True, "", 20.0, "that its job is on disk"),
        (False, True, "failed", 2.0, "it"),
        (False, False, "", 2.0, "it"),
        (True, True, "", 20.0, "that its job is on disk"),
        (True, True, "failed", 20.0, "it"),
        (True, False, "", 2.0, None),
    ],
)
def test_how_long_a_goodbye_may_take(away: bool, durable: bool, reason: str, until: float, what: str | None) -> None:
    """Longer where the answer says that the job is on disk, or others may lack what only this rank can repeat.

    It returned after 2 s while the job was not on disk yet, and said nothing.
    """
    session = active(durable=durable)
    if away:
        disconnect(session, 0.0)
    session.handle(happened.Leave(reason), 0.0)
    now, actions = 0.0, []
    while session.state is State.LEAVING:
        now = session.goodbye.answer_by
        actions = session.handle(happened.TimedOut(), now)
    assert now == until
    said = f"rank 1 has left job 'j', but the service at h:1 did not confirm {what}: no answer within {until:g} s."
    assert actions == [*([do.Warn(said)] if what else []), do.HangUp()]
    assert str(session.error) == LEFT


@pytest.mark.parametrize("reason", ["", "failed"])
def test_an_error_is_no_answer_to_a_goodbye(reason: str) -> None:
    """That the job could not be saved, for example; a rank that failed has said what it had to say."""
    session = active()
    session.handle(happened.Leave(reason), 0.0)
    said = "rank 1 has left job 'j', but the service at h:1 did not confirm that its job is on disk: it is full."
    assert session.handle(happened.Refused(1, ServiceError("it is full.")), 0.0) == [
        *([] if reason else [do.Warn(said)]),
        do.HangUp(),
    ]
    assert str(session.error) == LEFT


def test_a_rank_that_has_left_does_not_speak_of_a_broken_connection() -> None:
    """It says what is not confirmed, and at the end, that it never was."""
    session = active(5.0)
    session.handle(happened.Leave(""), 0.0)
    first, pause = disconnect(session, 0.0)
    assert first == do.Warn(
        "rank 1 has left, and the service at h:1 has not confirmed it yet (UNAVAILABLE: x): saying it again"
    )
    assert pause == do.Pause(0.02)
    session.handle(happened.PauseOver(), 0.0)
    last, hang_up = disconnect(session, 5.0, 2)
    assert isinstance(last, do.Warn)
    assert last.text.startswith(
        "rank 1 has left job 'j', but the service at h:1 did not confirm that its job is on disk: "
    )
    assert hang_up == do.HangUp()


def test_a_forked_child_does_nothing() -> None:
    """The connection is its parent's."""
    session = active()
    assert session.handle(happened.Forked(99), 0.0) == []
    assert str(session.error).startswith("Process 99 was forked from rank 1, which has joined its job: a rank is one ")
    assert session.handle(happened.Leave(""), 0.0) == []
    assert session.handle(happened.Abandon(), 0.0) == []
