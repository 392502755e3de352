"""A connection to the local socket must present its ticket within a short time."""

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bnproto.frames import framed
from bnproto.v1 import statistics_pb2 as pb
from bnserver.local import _STRANGERS, Callbacks, Frame, LocalSockets

_LIMIT_S = 60.0


def _ignore(*_: object) -> None:
    pass


def _played(
    scene: Callable[[LocalSockets, asyncio.Queue[int]], Coroutine[Any, Any, None]], attach_within_s: float = _LIMIT_S
) -> None:
    """Run a scene with open sockets, and the streams that asked there."""

    async def whole() -> None:
        asked = asyncio.Queue[int]()
        callbacks = Callbacks(lambda stream, request: asked.put_nowait(stream), _ignore, _ignore)
        sockets = LocalSockets(7, callbacks, attach_within_s)
        await sockets.open(50051)
        try:
            await asyncio.wait_for(scene(sockets, asked), _LIMIT_S)
        finally:
            await sockets.close()
            for _ in range(3):  # both ends hear of it
                await asyncio.sleep(0)

    asyncio.run(whole())


def test_who_says_nothing_is_shown_out_and_who_has_a_ticket_is_not() -> None:
    """A socket that is held open costs the service something."""

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        invitation = sockets.invitation(3)
        assert invitation is not None
        assert invitation.port == 50051
        path = f"\0{invitation.name}"
        theirs, ours = await asyncio.open_unix_connection(path)
        ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
        await theirs.readexactly(4)
        stranger, silent = await asyncio.open_unix_connection(path)  # later: its time is over last
        assert await stranger.read() == b""
        silent.close()
        ours.write(framed(pb.ExchangeRequest(pull=pb.Pull())))
        assert await asked.get() == 3
        assert sockets.is_active(3)
        sockets.end(3)
        assert not sockets.is_active(3)
        await theirs.read()  # until its end
        ours.close()

    _played(scene, attach_within_s=0.5)


def test_where_there_are_no_such_sockets_nobody_is_invited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, and the service goes on without."""

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        assert sockets.invitation(1) is None
        assert asked.empty()

    async def refused(*_: object, **__: object) -> None:
        raise OSError("not on this machine")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "create_unix_server", refused)
    _played(scene)
    assert caplog.messages == ["no local sockets (not on this machine): ranks on this machine exchange over gRPC"]


async def _attached(sockets: LocalSockets, stream: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    invitation = sockets.invitation(stream)
    assert invitation is not None
    theirs, ours = await asyncio.open_unix_connection(f"\0{invitation.name}")
    ours.write(framed(pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))))
    (size,) = struct.unpack("<I", await theirs.readexactly(4))
    await theirs.readexactly(size)
    return theirs, ours


def test_a_large_answer_waits_for_its_reader_message_by_message() -> None:
    """Copied for each rank at once, it held up all jobs, and took its size again for each rank."""

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        theirs, ours = await _attached(sockets, 1)
        frames = [Frame(pb.ExchangeResponse(generation=n, part=pb.Part(data=bytes(2**20)))) for n in range(1, 33)]
        sockets.send(1, frames)
        assert (
            sum(frame._data != b"" for frame in frames) <= 3
        )  # what the kernel holds, and the one that it takes in part
        for frame in frames:
            assert await theirs.readexactly(len(frame.data)) == frame.data
        ours.close()

    _played(scene)


def test_the_first_of_too_many_strangers_is_shown_out() -> None:
    """They would use up the files that ranks need."""

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        invitation = sockets.invitation(1)
        assert invitation is not None
        path = f"\0{invitation.name}"
        ends = [await asyncio.open_unix_connection(path) for _ in range(_STRANGERS + 1)]
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

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        invitation = sockets.invitation(1)
        assert invitation is not None
        ends = [socket.socket(socket.AF_UNIX) for _ in range(300)]
        for end in ends:
            end.setblocking(False)
            end.connect(f"\0{invitation.name}")  # the loop, which would take them in, does not run meanwhile
        for end in ends:
            end.close()

    _played(scene)
