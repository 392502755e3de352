"""A way on which a rank's requests reach the service, and the answers come back: what one may do.

Which one a connection uses is decided once, when the ranks have joined; nothing asks which one it is afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bnproto.arrays import PayloadAssembler, WireError
from bnproto.v1 import statistics_pb2 as pb


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and all bytes of its payload."""

    response: pb.ExchangeResponse
    data: bytes | bytearray


class Channel(Protocol):
    """Carries requests and answers, each in the order in which it was sent, and none twice.

    One thread receives. Any thread may close it: whoever sends or receives then gets an error.
    """

    def send(self, requests: Sequence[pb.ExchangeRequest]) -> None:
        """Send a request and the parts of its payload, with nothing in between.

        Raises:
            OSError: the channel is closed, from either side.
        """

    def receive(self, timeout: float) -> Answer | None:
        """The next answer, whole; None if there is none for so many seconds.

        Raises:
            OSError: the channel is closed, from either side.
            WireError: what was received makes no sense.
        """

    def close(self) -> None:
        """End it, without a wait."""


class AnswerAssembler:
    """Puts answers together from the messages in which they travel."""

    def __init__(self) -> None:
        self._begun: tuple[pb.ExchangeResponse, PayloadAssembler] | None = None

    def add(self, response: pb.ExchangeResponse) -> Answer | None:
        """Take the next message; returns the answer that it completes.

        Raises:
            WireError: it does not continue the answer that has begun, or begins none.
        """
        kind = response.WhichOneof("message")
        if (kind == "part") is not (self._begun is not None):
            raise WireError(f"expected {'a part' if self._begun else 'the begin'} of an answer, received {kind}")
        if self._begun is not None:
            first, joining = self._begun
            joining.add(response.part)
        else:
            first = response
            if kind not in ("result", "owned"):
                return Answer(response, b"")
            payload = response.result.payload if kind == "result" else response.owned.payload
            data = payload.data
            if len(data) == payload.size:
                return Answer(response, data)
            joining = PayloadAssembler(payload)
        self._begun = None if joining.complete else (first, joining)
        return Answer(first, joining.data) if joining.complete else None
