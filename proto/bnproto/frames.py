"""Messages on a local socket: each after its length, in 4 bytes, little-endian.

Nothing is sent or received here: bytes come in as they arrive, and announced messages go out.
"""

from __future__ import annotations

import struct

from google.protobuf.message import Message

from bnproto.arrays import WireError

# As gRPC's own limit on the stream.
LARGEST_BYTES = 4 * 2**20

_LENGTH = struct.Struct("<I")
_FIRST_ROOM = 2**16


def framed(message: Message) -> bytes:
    """A message with its length in front."""
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Cuts the bytes of one direction of a local socket into messages.

    Receive into `room`, pass the number of bytes to `received`, and take messages with `next` while there are any.

    Args:
        largest: of the messages, in bytes.
    """

    def __init__(self, largest: int = LARGEST_BYTES) -> None:
        self.largest = largest
        self._bytes = bytearray(min(_FIRST_ROOM, _LENGTH.size + largest))
        self._start = 0
        self._stop = 0

    def room(self) -> memoryview:
        """Where the next bytes go; never empty, once all announced messages are taken.

        Raises:
            WireError: a message is announced that is larger than any.
        """
        held = self._stop - self._start
        needed = _LENGTH.size
        if held == 0:
            self._start = self._stop = 0
        elif held >= _LENGTH.size:
            needed = self._announced()
        if self._start + needed > len(self._bytes) or self._stop == len(self._bytes):
            moved = bytearray(max(_FIRST_ROOM, needed))
            moved[:held] = memoryview(self._bytes)[self._start : self._stop]
            self._bytes, self._start, self._stop = moved, 0, held
        return memoryview(self._bytes)[self._stop :]

    def received(self, count: int) -> None:
        """Record that so many bytes were received."""
        self._stop += count

    def next(self) -> bytes | None:
        """The next message's bytes; None before the last of them has come.

        Raises:
            WireError: it is larger than any.
        """
        held = self._stop - self._start
        if held < _LENGTH.size or held < (announced := self._announced()):
            return None
        begin = self._start + _LENGTH.size
        self._start += announced
        return bytes(memoryview(self._bytes)[begin : self._start])

    def _announced(self) -> int:
        """The size of the message that is coming, with its length, which must be there."""
        (size,) = _LENGTH.unpack_from(self._bytes, self._start)
        if size > self.largest:
            raise WireError(f"expected a message of at most {self.largest} bytes, received one of {size}")
        return _LENGTH.size + int(size)
