"""A connection to the local socket must present its ticket within a short time."""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bnproto.frames import framed
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.events import ConnectionEnded, Event, Pull
from bnserver.grpc_channel import GrpcChannel
from bnserver.local_channel import _AT_ONCE, LocalChannel
from bnserver.local_listener import _MOST_UNATTACHED, LocalListener
from bnserver.rank_channel import Outgoing

_LIMIT_S = 60.0


class _Scene:
    """A listener, connections, and the events of what arrives on them."""

    def __init__(self, attach_within_s: float) -> None:
        self.listener = LocalListener(7, attach_within_s=attach_within_s)
        self.events = asyncio.Queue[Event]()

    def connection(self, number: int) -> Connection:
        """One that has joined over gRPC."""
        connection = Connection(number, GrpcChannel(), self.events.put_nowait)
        connection.receive(pb.ExchangeRequest(join=pb.Join(job="j", world_size=1)), b"")
        self.events.get_nowait()
        return connection


def _played(scene: Callable[[_Scene], Coroutine[Any, Any, None]], attach_within_s: float = _LIMIT_S) -> None:
    """Run a scene with an open listener."""

    async def run() -> None:
        it = _Scene(attach_within_s)
        await it.listener.open(50051)
        try:
            await asyncio.wait_for(scene(it), _LIMIT_S)
        finally:
            await it.listener.close()
            for _ in range(3):  # both ends hear of it
                await asyncio.sleep(0)

    asyncio.run(run())


def test_who_says_nothing_is_shown_out_and_who_has_a_ticket_is_not() -> None:
    """A socket that is held open costs the service something."""

    async def scene(it: _Scene) -> None:
        connection = it.connection(3)
        invitation = it.listener.invitation(connection)
        assert invitation is not None
        assert invitation.port == 50051
        path = f"\0{invitation.name}"
        theirs, ours = await asyncio.open_unix_connection(path)
        ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
        await theirs.readexactly(4)
        stranger, silent = await asyncio.open_unix_connection(path)  # later: its time is over last
        assert await stranger.read() == b""
        silent.close()
        ours.write(framed(pb.ExchangeRequest(pull=pb.Pull(layer="a"))))
        assert await it.events.get() == Pull(3, "a")
        connection.end(None)
        await theirs.read()  # until its end
        assert it.events.empty()  # it was the service that ended it
        ours.close()

    _played(scene, attach_within_s=0.5)


def test_where_there_are_no_such_sockets_nobody_is_invited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, and the service goes on without."""

    async def scene(it: _Scene) -> None:
        assert it.listener.invitation(it.connection(1)) is None

    def refused(*_: object) -> None:
        raise OSError("not on this machine")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "listen", refused)
        _played(scene)
    assert caplog.messages == ["no local sockets (not on this machine): ranks on this machine exchange over gRPC"]


async def _attached(it: _Scene, connection: Connection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    invitation = it.listener.invitation(connection)
    assert invitation is not None
    theirs, ours = await asyncio.open_unix_connection(f"\0{invitation.name}")
    ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
    (size,) = struct.unpack("<I", await theirs.readexactly(4))
    await theirs.readexactly(size)
    return theirs, ours


def test_a_large_answer_waits_for_its_reader_message_by_message() -> None:
    """Copied for each rank at once, it held up all jobs, and took its size again for each rank."""

    async def scene(it: _Scene) -> None:
        connection = it.connection(1)
        theirs, ours = await _attached(it, connection)
        messages = [Outgoing(pb.ExchangeResponse(generation=n, part=pb.Part(data=bytes(2**20)))) for n in range(1, 33)]
        connection.channel.send(messages)
        # What the kernel holds, and the one that it takes in part.
        assert sum(message.data != b"" for message in messages) <= 3
        for message in messages:
            assert await theirs.readexactly(len(message.frame())) == message.data
        ours.close()
        assert await it.events.get() == ConnectionEnded(1)

    _played(scene)


def test_many_small_messages_are_handled_a_few_at_a_time() -> None:
    """One rank that sent thousands at once held up all others until the last was handled."""
    number = 20_000  # several times what is received at once

    async def scene(it: _Scene) -> None:
        _, ours = await _attached(it, it.connection(1))
        ours.write(number * framed(pb.ExchangeRequest(pull=pb.Pull(layer="a"))))
        handled = most = 0
        while handled < number:
            await asyncio.sleep(0)  # one turn of the loop
            arrived = it.events.qsize()
            for _ in range(arrived):
                assert it.events.get_nowait() == Pull(1, "a")
            handled, most = handled + arrived, max(most, arrived)
        assert most <= 2 * _AT_ONCE
        ours.close()
        assert await it.events.get() == ConnectionEnded(1)

    _played(scene)


def test_answers_that_nobody_reads_are_counted() -> None:
    """As long as some wait; a rank that reads them may ask as often as it wants."""

    async def scene(it: _Scene) -> None:
        connection = it.connection(1)
        theirs, ours = await _attached(it, connection)
        answer = [Outgoing(pb.ExchangeResponse(part=pb.Part(data=bytes(2**20))))]
        size = len(answer[0].frame())
        for _ in range(3):
            connection.answer(answer)
        assert connection.channel.unread == 2  # the first was on its way
        await theirs.readexactly(3 * size)
        connection.answer(answer)
        assert connection.channel.unread == 0
        ours.close()

    _played(scene)


def test_the_oldest_of_too_many_unattached_sockets_is_closed() -> None:
    """They would use up the files that ranks need."""

    async def scene(it: _Scene) -> None:
        invitation = it.listener.invitation(it.connection(1))
        assert invitation is not None
        path = f"\0{invitation.name}"
        ends = [await asyncio.open_unix_connection(path) for _ in range(_MOST_UNATTACHED + 1)]
        (theirs, _), *others = ends
        assert await theirs.read() == b""
        _, ours = others[0]
        ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
        assert await others[0][0].readexactly(4)  # it is still there
        for _, end in ends:
            end.close()

    _played(scene)


def test_a_whole_job_may_come_at_once() -> None:
    """More ranks than asyncio lets wait by itself: some stayed on gRPC, for good, without a word."""

    async def scene(it: _Scene) -> None:
        invitation = it.listener.invitation(it.connection(1))
        assert invitation is not None
        ends = [socket.socket(socket.AF_UNIX) for _ in range(300)]
        for end in ends:
            end.setblocking(False)
            end.connect(f"\0{invitation.name}")  # the loop, which would take them in, does not run meanwhile
        for end in ends:
            end.close()

    _played(scene)


def test_few_are_accepted_before_others_have_their_turn() -> None:
    """Whoever connects without end must not keep the service from its jobs."""

    async def scene(it: _Scene) -> None:
        invitation = it.listener.invitation(it.connection(1))
        assert invitation is not None
        ends = [socket.socket(socket.AF_UNIX) for _ in range(40)]
        for end in ends:
            end.setblocking(False)
            end.connect(f"\0{invitation.name}")
        turn, turns = 0, []
        connected = it.listener.connected

        def counted(channel: LocalChannel) -> None:
            turns.append(turn)
            connected(channel)

        it.listener.connected = counted  # type: ignore[method-assign]
        while len(turns) < len(ends):
            turn += 1
            await asyncio.sleep(0)
        assert max(Counter(turns).values()) <= 8
        for end in ends:
            end.close()

    _played(scene)


def test_many_unattached_sockets_of_one_user_do_not_displace_another() -> None:
    """Whose sockets they are is known from the kernel."""

    async def scene(it: _Scene) -> None:
        mine = LocalChannel(it.listener, user=1)
        it.listener.connected(mine)
        strangers = [LocalChannel(it.listener, user=2) for _ in range(_MOST_UNATTACHED)]
        for stranger in strangers:
            it.listener.connected(stranger)
        assert [stranger.is_closed for stranger in strangers].count(True) == 1
        assert not mine.is_closed

    _played(scene)


def test_an_invitation_ends_with_its_connection() -> None:
    """A ticket that is presented too late opens nothing: the rank joins anew, and gets another."""

    async def scene(it: _Scene) -> None:
        for end in (it.listener.revoke, lambda connection: connection.end(None)):
            connection = it.connection(1)
            invitation = it.listener.invitation(connection)
            assert invitation is not None
            end(connection)
            theirs, ours = await asyncio.open_unix_connection(f"\0{invitation.name}")
            ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
            assert await theirs.read() == b""
            ours.close()

    _played(scene)
