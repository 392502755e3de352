"""A rank's session without a connection: how it comes back, what it says, and when it gives up."""

import pytest

from bnlayer import PeerLostError
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.session import State
from support.rank_session import active, disconnect, fresh, in_state, pull


def test_pauses_grow_and_differ_between_ranks() -> None:
    """From 0.02 s to 0.5 s; half of each is drawn at random. A connection that was of use begins anew."""
    session = active()
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
    assert disconnect(session, now, 9)[-1] == do.Pause(0.02)


def test_it_warns_once_an_outage_of_what_it_waits_for() -> None:
    """At once where it was in a job; after 2 s where it has not found the service yet."""
    broke = "rank 1: the connection to the service at h:1 broke (UNAVAILABLE: x); trying for 300 s to come back"
    session = active()
    assert disconnect(session, 0.0) == [do.Warn(broke), do.Pause(0.02)]
    session.handle(happened.PauseOver(), 0.0)
    assert disconnect(session, 0.0, 2) == [do.Pause(0.04)]
    session = in_state(State.JOINING)
    assert disconnect(session, 1.9) == [do.Pause(0.02)]
    session.handle(happened.PauseOver(), 1.9)
    late = "nobody listens at h:1 yet; trying until 300 s have passed (timeout=)"
    assert disconnect(session, 2.0, 2) == [do.Warn(late), do.Pause(0.04)]


@pytest.mark.parametrize(
    ("joined", "text"),
    [
        (
            False,
            "No statistics service could be reached at h:1 within 5 s. Check the address, and that the service runs",
        ),
        (
            True,
            (
                "The connection to the service at h:1 broke, and could not be made anew within 5 s (UNAVAILABLE: x). "
                "It is down, or this host is cut off from it. "
            ),
        ),
    ],
)
def test_it_gives_up_after_its_timeout(joined: bool, text: str) -> None:
    """The last pause is as long as what is left; then the error says what is known."""
    session = fresh(5.0)
    session.handle(happened.Begin(), 0.0)
    if joined:
        session.handle(happened.Joined(1, 3, durable=True), 0.0)
    disconnect(session, 0.0)
    session.handle(happened.PauseOver(), 0.0)
    assert disconnect(session, 4.99, 2)[-1] == do.Pause(5.0 - 4.99)
    session.handle(happened.PauseOver(), 5.0)
    assert disconnect(session, 5.0, 3) == [do.HangUp()]
    assert session.state is State.CLOSED
    assert str(session.error).startswith(text)


def test_a_service_that_keeps_nothing_is_not_waited_for_once_nobody_listens() -> None:
    """There is nothing to come back to; half a second is for one that is cut off for a moment."""
    session = active(durable=False)
    assert disconnect(session, 10.0)[-1] == do.Pause(0.02)
    session.handle(happened.PauseOver(), 10.1)
    assert disconnect(session, 10.5, 2) == [do.Probe()]
    assert session.handle(happened.Probed(listens=True), 10.5) == [do.Pause(0.04)]
    session.handle(happened.PauseOver(), 10.6)
    assert disconnect(session, 10.6, 3) == [do.Probe()]
    assert session.handle(happened.Probed(listens=False), 10.6) == [do.HangUp()]
    assert "could not be made anew within 0.5 s (UNAVAILABLE: x)" in str(session.error)


def test_a_local_socket_that_ends_is_closed_and_the_reason_waited_for() -> None:
    """The service ends the connection then, and may say why."""
    session = active()
    assert session.handle(happened.ChannelBroken(1), 0.0) == [do.CloseChannel(1)]
    assert session.handle(happened.Ask(pull()), 0.0) == []
    assert session.handle(happened.Refused(1, PeerLostError("rank 0 was lost")), 0.0) == [do.HangUp()]
    assert isinstance(session.error, PeerLostError)


def test_a_late_answer_ends_it() -> None:
    """The service ends a wait at the deadline, and has one second more to say so."""
    session = active(5.0)
    assert session.answer_within == 6.0
    assert session.handle(happened.TimedOut(), 6.0) == [do.HangUp()]
    assert str(session.error).startswith("The service at h:1 did not answer within 5 s. It may be frozen or cut off;")
