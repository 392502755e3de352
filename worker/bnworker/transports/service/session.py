"""A rank's session with the statistics service: events come in, actions go out.

It decides what is sent, and sent again on the next connection; which answers count; when a connection is made anew, how
long that may take, and what the rank raises where it fails. It has no clock, socket or thread: the time is passed in,
and `client` does what the actions say. So it runs against the service's own core in memory (`test_session_history`).

An answer counts once, and only on the connection that is current: on the next one it is asked for again. What that
next connection begins with is kept in `repetition`, the times of an outage in `outage`, those of leaving in `goodbye`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, ClassVar

from bnlayer.errors import CollectiveError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service import explanations
from bnworker.transports.service.actions import (
    Action,
    CloseChannel,
    Deliver,
    HangUp,
    Open,
    Pause,
    Probe,
    Repeat,
    Send,
    SendOnStream,
    Wake,
    Warn,
)
from bnworker.transports.service.events import (
    Abandon,
    Ask,
    Begin,
    ChannelBroken,
    Disconnected,
    Event,
    Forked,
    Joined,
    Leave,
    OwnerVersion,
    PauseOver,
    Probed,
    Received,
    Refused,
    Repeated,
    Requests,
    TimedOut,
)
from bnworker.transports.service.goodbye import Goodbye
from bnworker.transports.service.outage import Outage
from bnworker.transports.service.repetition import Repetition

# The service ends a wait at the deadline, and knows why; it gets this long to say so.
_LATE_S = 1.0
# Any: each method takes the events of its own kind.
_Decide = Callable[["Session", Any, float], list[Action]]


class State(Enum):
    """Where a session is."""

    CONNECTING = auto()  # not all ranks have joined yet, and there is no connection
    JOINING = auto()  # a connection was opened with a join: waits for the others, or sends what the service may lack
    ACTIVE = auto()  # requests are sent and answered
    AWAY = auto()  # the connection can't be used any more, and is made anew
    LEAVING = auto()  # the rank has said goodbye, or will on the next connection
    CLOSED = auto()  # over: `error` says why

    __hash__ = object.__hash__  # each is one object; Enum's own hashes the name, in Python, for every event


class ImpossibleEventError(AssertionError):
    """An event that can't happen in this state: a fault of whoever performs the actions."""


class Session:
    """One rank's session.

    Args:
        address: of the service, for errors.
        join: how this rank takes its place; gets the rank and world size that the service chooses in an elastic job.
        timeout: seconds to wait for all ranks, for each answer, and for a service that is away.
        now: seconds, on the clock of `handle`.

    Attributes:
        state: where it is.
        error: what every exchange raises once it is over.
        generation: of the job; 0 before all ranks have joined.
        repetition: what was asked and answered.
        goodbye: how it leaves.
        answer_within: seconds that the rank waits before `TimedOut`.
    """

    def __init__(self, address: str, join: pb.Join, timeout: float, now: float) -> None:
        self.state = State.CONNECTING
        self.error: CollectiveError | None = None
        self.generation = 0
        self.answer_within = timeout + _LATE_S
        self._address = address
        self._join = join
        self._timeout = timeout
        self._durable = True
        self._connection = 0
        self._joined = False  # on this connection
        self._repeated: Requests = ()  # that was asked, when what is repeated on this connection was put together
        self.repetition = Repetition()
        self._outage = Outage(timeout, now)
        self.goodbye = Goodbye()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Decide what an event brings about.

        Args:
            event: what happened.
            now: seconds, on a clock that never goes back.

        Raises:
            ImpossibleEventError: not in this state.
        """
        decide = self.TABLE[self.state].get(type(event))
        if decide is None:
            raise ImpossibleEventError(f"{type(event).__name__} can't happen in {self.state.name}")
        actions = decide(self, event, now)
        if self.error is not None:  # a signal handler may have closed the session in the middle of this
            self.state = State.CLOSED
        return actions

    # ---- requests and answers ----

    def _ask(self, event: Ask, now: float) -> list[Action]:
        del now
        self.repetition.asked = event.requests
        return [Send(self._connection, event.requests)]

    def _ask_later(self, event: Ask, now: float) -> list[Action]:
        """There is no connection to ask on: the next one begins with what is not answered."""
        del now
        self.repetition.asked = event.requests
        return []

    def _receive(self, event: Received, now: float) -> list[Action]:
        del now
        if event.connection != self._connection or not self.repetition.asked:
            return []
        response, asked = event.answer.response, self.repetition.asked[0]
        if response.HasField("result") and asked.HasField("contribution"):
            contribution, sequence = asked.contribution, response.result.sequence
            if sequence <= self.repetition.answered:
                return []  # to what was repeated
            if sequence != contribution.sequence:
                return self._close(explanations.out_of_step(self._address, sequence, contribution.sequence))
            self.repetition.contribution_answered(contribution, response.result)
        elif not response.HasField("owned") or not (asked.HasField("pull") or asked.HasField("push")):
            return []
        self.repetition.asked = ()
        return [Deliver(event.answer)]

    def _note_version(self, event: OwnerVersion, now: float) -> list[Action]:
        del now
        self.repetition.note_version(event.layer, event.version)
        return []

    # ---- a connection, from its begin to its end ----

    def _open(self, event: Begin | PauseOver, now: float) -> list[Action]:
        del event, now
        self._connection += 1
        join = pb.Join()
        join.CopyFrom(self._join)
        if self.generation:
            self.repetition.resume(join, self.generation)
        requests = [pb.ExchangeRequest(join=join)]
        if self.state is State.LEAVING:
            requests += self.repetition.requests
            self.goodbye.connection = self._connection
        else:
            self.state = State.JOINING
        return [Open(self._connection, requests)]

    def _enter(self, event: Joined, now: float) -> list[Action]:
        """The service takes part: it gets what it may lack, then the rank goes on."""
        del now
        actions: list[Action] = []
        if self._join.HasField("elastic"):
            if event.rank is None or event.world_size is None:
                return self._close(explanations.not_elastic(self._address))
            self._join.rank, self._join.world_size = event.rank, event.world_size
        if self.generation:
            actions.append(Warn(f"rank {self._join.rank} is back at the service at {self._address}"))
        self.generation = self.generation or event.generation
        self._durable, self._joined = event.durable, True
        if self.state is State.LEAVING:  # its goodbye came with the join
            return actions
        self._repeated = self.repetition.asked
        if requests := self.repetition.requests:
            return [*actions, Repeat(self._connection, requests)]
        self.state = State.ACTIVE
        return [*actions, Wake()]

    def _go_on(self, event: Repeated, now: float) -> list[Action]:
        del event, now
        self.state = State.ACTIVE
        if self.repetition.asked and self.repetition.asked is not self._repeated:  # it was asked meanwhile
            return [Send(self._connection, self.repetition.asked), Wake()]
        return [Wake()]

    def _channel_broken(self, event: ChannelBroken, now: float) -> list[Action]:
        del now
        if event.connection != self._connection:
            return []
        self.state, self._joined = State.AWAY, False
        return [CloseChannel(self._connection)]

    def _disconnect(self, event: Disconnected, now: float) -> list[Action]:
        if self.state is State.LEAVING and event.code == "OK" and self.goodbye.connection == event.connection:
            return self._close(explanations.left())
        if self._joined or self.state is State.AWAY:  # it was of use
            self._outage.begin(now)
        self._joined, self._outage.ended = False, event
        if self.state is not State.LEAVING:
            self.state = State.AWAY if self.generation else State.CONNECTING
        if not self._durable and self._outage.may_be_permanent(now):
            return [Probe()]
        return self._reconnect(event, now)

    def _check_outage(self, event: Probed, now: float) -> list[Action]:
        assert self._outage.ended is not None
        if not event.listens:
            self._outage.port_is_free()
        return self._reconnect(self._outage.ended, now)

    def _reconnect(self, ended: Disconnected, now: float) -> list[Action]:
        """Connect once more after a pause, or give up."""
        outage = self._outage
        if outage.is_over_limit(now):
            if not self.generation:
                return self._close(explanations.never_reached(self._address, self._timeout))
            if self.state is State.LEAVING:
                return self._unconfirmed(f"{ended.code}: {ended.text}")
            return self._close(explanations.not_made_anew(self._address, outage.limit_s, ended))
        actions: list[Action] = []
        if outage.must_warn(now, has_joined=self.generation > 0):
            if self.state is State.LEAVING:
                text = explanations.goodbye_repeated(self._join.rank, self._address, ended)
            elif self.generation:
                text = explanations.broken(self._join.rank, self._address, outage.limit_s, ended)
            else:
                text = explanations.not_reached_yet(self._address, self._timeout)
            actions.append(Warn(text))
        return [*actions, Pause(outage.next_pause(now, ended.jitter))]

    # ---- the end ----

    def _fail(self, event: Refused, now: float) -> list[Action]:
        del now
        return self._close(event.error)

    def _leave(self, event: Leave, now: float) -> list[Action]:
        """Say goodbye, on the stream: what was interrupted may still hold up the channel."""
        before, self.state = self.state, State.LEAVING
        self.repetition.asked = [self.goodbye.say(event.reason, now)]
        if before is State.AWAY:
            return []
        self.goodbye.connection = self._connection
        return [
            SendOnStream(
                self._connection, self.repetition.asked if before is State.ACTIVE else self.repetition.requests
            )
        ]

    def _time_out(self, event: TimedOut, now: float) -> list[Action]:
        del event, now
        return self._close(explanations.late(self._address, self._timeout))

    def _time_out_leaving(self, event: TimedOut, now: float) -> list[Action]:
        del event
        counts = self._durable and (self.goodbye.is_clean or not self._joined)
        if counts and self.goodbye.extend(self._timeout):
            return []
        return self._unconfirmed(self.goodbye.late(now))

    def _fail_leaving(self, event: Refused, now: float) -> list[Action]:
        del now
        return self._unconfirmed(str(event.error)) if self.goodbye.is_clean else self._close(explanations.left())

    def _unconfirmed(self, why: str) -> list[Action]:
        """The goodbye was not answered: that is said, and not taken for success."""
        # Without a state directory, a service that has gone has nothing to confirm.
        warn = self.goodbye.unconfirmed(self._join, self._address, why, durable=self._durable)
        return [*([warn] if self._durable or self._joined else []), *self._close(explanations.left())]

    def _abandon(self, event: Abandon, now: float) -> list[Action]:
        del event, now
        return self._close(explanations.left())

    def _fork(self, event: Forked, now: float) -> list[Action]:
        """Nothing is done: the connection is the parent's."""
        del now
        self.error = explanations.forked(event.pid, self._join.rank)
        return []

    def _ignore(self, event: Event, now: float) -> list[Action]:
        """It comes too late to matter."""
        del event, now
        return []

    def _close(self, error: CollectiveError) -> list[Action]:
        self.error = self.error or error
        return [HangUp()]

    # What can happen in which state, and what decides about it then. What is not in the table can't happen.
    TABLE: ClassVar[Mapping[State, Mapping[type[Event], _Decide]]] = {
        State.CONNECTING: {
            Begin: _open,
            PauseOver: _open,
            Probed: _check_outage,
            TimedOut: _time_out,
            Abandon: _abandon,
            Forked: _fork,
        },
        State.JOINING: {
            Ask: _ask_later,
            Joined: _enter,
            Repeated: _go_on,
            Received: _ignore,
            OwnerVersion: _note_version,
            ChannelBroken: _channel_broken,
            Disconnected: _disconnect,
            Refused: _fail,
            TimedOut: _time_out,
            Leave: _leave,
            Abandon: _abandon,
            Forked: _fork,
        },
        State.ACTIVE: {
            Ask: _ask,
            Joined: _ignore,
            Received: _receive,
            OwnerVersion: _note_version,
            ChannelBroken: _channel_broken,
            Disconnected: _disconnect,
            Refused: _fail,
            TimedOut: _time_out,
            Leave: _leave,
            Abandon: _abandon,
            Forked: _fork,
        },
        State.AWAY: {
            Ask: _ask_later,
            Joined: _ignore,
            Repeated: _ignore,
            Received: _ignore,
            OwnerVersion: _note_version,
            ChannelBroken: _ignore,
            Disconnected: _disconnect,
            Refused: _fail,
            Probed: _check_outage,
            PauseOver: _open,
            TimedOut: _time_out,
            Leave: _leave,
            Abandon: _abandon,
            Forked: _fork,
        },
        State.LEAVING: {
            Ask: _ignore,
            Joined: _enter,
            Repeated: _ignore,
            Received: _ignore,
            OwnerVersion: _ignore,
            ChannelBroken: _ignore,
            Disconnected: _disconnect,
            Refused: _fail_leaving,
            Probed: _check_outage,
            PauseOver: _open,
            TimedOut: _time_out_leaving,
            Leave: _ignore,
            Abandon: _abandon,
            Forked: _fork,
        },
        State.CLOSED: {
            Ask: _ignore,
            Joined: _ignore,
            Repeated: _ignore,
            Received: _ignore,
            OwnerVersion: _ignore,
            ChannelBroken: _ignore,
            Disconnected: _ignore,
            Refused: _ignore,
            Probed: _ignore,
            PauseOver: _ignore,
            TimedOut: _ignore,
            Leave: _ignore,
            Abandon: _ignore,
            Forked: _ignore,
        },
    }
