"""Streams whose rank sends no join are ended, and are few."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest.mock import AsyncMock

import grpc.aio
import pytest

from bnproto.failures import StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.admission import Admission
from bnserver.authorization import Grant, Grants, Role
from bnserver.connection import Connection
from bnserver.grpc_channel import GrpcChannel
from bnserver.unjoined import Unjoined


def _status(channel: GrpcChannel) -> str:
    if channel.outgoing.empty():
        return "open"
    ended = channel.outgoing.get_nowait()
    assert isinstance(ended, StatusParts)
    return ended.message


def _played(unjoined: Unjoined, spoke: Callable[[int], bool]) -> list[str]:
    """What becomes of four streams, of which some send their join."""

    async def scene() -> list[str]:
        channels = [GrpcChannel() for _ in range(4)]
        for number, channel in enumerate(channels):
            connection = Connection(number, channel, lambda _: None)
            unjoined.add(connection)
            if spoke(number):
                unjoined.remove(connection)
        await asyncio.sleep(0.01)
        return [_status(channel) for channel in channels]

    return asyncio.run(scene())


def test_who_says_nothing_is_ended() -> None:
    """A stream costs memory and a file; a rank sends its join at once."""
    ends = _played(Unjoined(join_within_s=0), lambda number: number == 1)
    late = "Expected a join within 0 s of opening the stream, received none."
    assert ends == [late, "open", late, late]


@pytest.mark.parametrize(("most", "ended"), [(4, []), (2, [0, 1])])
def test_one_too_many_ends_the_oldest(most: int, ended: list[int]) -> None:
    """However many are opened."""
    ends = _played(Unjoined(most=most), lambda _: False)
    assert [number for number, end in enumerate(ends) if end.startswith(f"More than {most} streams")] == ended
    assert ends.count("open") == 4 - len(ended)


def test_streams_that_wait_with_a_token_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their first message is read before the servicer knows of them; another token's streams do not count."""
    monkeypatch.setattr("bnserver.admission.MOST", 1)
    grants = [Grant(name, name.encode(), ("*",), Role.WORKER) for name in ("greedy", "calm")]
    admission = Admission(Grants(tuple(grants)))
    answers: list[str] = []

    async def scene() -> None:
        opened = asyncio.Event()

        async def silent() -> AsyncIterator[pb.ExchangeRequest]:
            opened.set()
            await asyncio.Event().wait()
            yield pb.ExchangeRequest()

        async def joined() -> AsyncIterator[pb.ExchangeRequest]:
            yield pb.ExchangeRequest(join=pb.Join(job="j"))

        async def proceed(requests: AsyncIterator[pb.ExchangeRequest], context: Any) -> None:
            answers.append((await anext(requests)).join.job)

        async def refused(code: grpc.StatusCode, text: str, details: object) -> None:
            answers.append(text)
            raise grpc.aio.AbortError

        context = AsyncMock()
        context.abort = refused
        greedy, calm = (admission._admitting_stream(grant, proceed) for grant in grants)
        waiting = asyncio.ensure_future(greedy(silent(), context))
        await opened.wait()
        with pytest.raises(grpc.aio.AbortError):
            await greedy(joined(), context)
        await calm(joined(), context)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await greedy(joined(), context)

    asyncio.run(scene())
    assert answers == ["1 streams with the token 'greedy' are open that have not joined. Try again.", "j", "j"]
