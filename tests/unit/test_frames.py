"""Messages on a local socket are cut where they begin and end, however the bytes arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnproto.arrays import WireError
from bnproto.frames import LARGEST_BYTES, Frames, framed
from bnproto.v1 import statistics_pb2 as pb


def _received(frames: Frames, data: bytes, chunk: int) -> list[bytes]:
    """All messages of some bytes, which arrive in chunks."""
    messages = []
    while data:
        room = frames.room()
        count = min(chunk, len(room), len(data))
        assert count
        room[:count] = data[:count]
        data = data[count:]
        frames.received(count)
        while (message := frames.next()) is not None:
            messages.append(message)
    return messages


def _part(size: int) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(part=pb.Part(data=bytes(n % 251 for n in range(size))))


@given(st.lists(st.integers(0, 300_000), max_size=6), st.integers(1, 100_000))
def test_any_chunks_give_the_same_messages(sizes: list[int], chunk: int) -> None:
    """Whole, halved, several at once, larger than the buffer is at first."""
    sent = [_part(size) for size in sizes]
    received = _received(Frames(), b"".join(map(framed, sent)), max(chunk, sum(sizes) // 1000))
    assert [pb.ExchangeRequest.FromString(message) for message in received] == sent


def test_byte_by_byte() -> None:
    """A length may be cut, too."""
    sent = [_part(5), pb.ExchangeRequest(), _part(70)]
    received = _received(Frames(), b"".join(map(framed, sent)), 1)
    assert [pb.ExchangeRequest.FromString(message) for message in received] == sent


@pytest.mark.parametrize("largest", [64, LARGEST_BYTES])
def test_a_message_larger_than_any_is_refused_before_there_is_room_for_it(largest: int) -> None:
    """Its length alone says so."""
    frames = Frames(largest)
    frames.room()[:4] = (largest + 1).to_bytes(4, "little")
    frames.received(4)
    with pytest.raises(
        WireError, match=f"expected a message of at most {largest} bytes, received one of {largest + 1}"
    ):
        frames.next()
    with pytest.raises(WireError):
        frames.room()
