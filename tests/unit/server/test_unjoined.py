"""Streams whose rank sends no join are ended, and are few."""

import asyncio
from collections.abc import Callable

import pytest

from bnproto.failures import StatusParts
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
