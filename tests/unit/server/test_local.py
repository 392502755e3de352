"""Who connects to the local socket has a short time to say what for."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bnproto.frames import framed
from bnproto.v1 import statistics_pb2 as pb
from bnserver import local
from bnserver.local import LocalSockets, Visitors

_LIMIT_S = 20.0


def _played(scene: Callable[[LocalSockets, asyncio.Queue[int]], Coroutine[Any, Any, None]]) -> None:
    """Run a scene with open sockets, and the streams that asked there."""

    async def whole() -> None:
        asked = asyncio.Queue[int]()
        sockets = LocalSockets(7, Visitors(lambda stream, request: asked.put_nowait(stream), lambda stream, text: None))
        await sockets.open(50051)
        try:
            await asyncio.wait_for(scene(sockets, asked), _LIMIT_S)
        finally:
            sockets.close()

    asyncio.run(whole())


def test_who_says_nothing_is_shown_out_and_who_has_a_ticket_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is held open costs the service something."""
    monkeypatch.setattr(local, "_ATTACH_WITHIN_S", 0.05)

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
        assert sockets.stands(3)
        sockets.end(3)
        assert not sockets.stands(3)
        await theirs.read()  # until its end
        ours.close()

    _played(scene)


def test_where_there_are_no_such_sockets_nobody_is_invited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, and the service goes on without."""

    async def scene(sockets: LocalSockets, asked: asyncio.Queue[int]) -> None:
        assert sockets.invitation(1) is None
        assert asked.empty()

    async def refused(*_: object) -> None:
        raise OSError("not on this machine")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "create_unix_server", refused)
    _played(scene)
    assert caplog.messages == ["no local sockets (not on this machine): ranks on this machine exchange over gRPC"]
