"""Answers of the service, assembled from the messages in which they arrive."""

from __future__ import annotations

from dataclasses import dataclass

from bnproto.arrays import PayloadAssembler, WireError
from bnproto.v1 import statistics_pb2 as pb


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and all bytes of its payload."""

    response: pb.ExchangeResponse
    data: bytes | bytearray


class Whole:
    """Assembles the parts of an answer."""

    def __init__(self) -> None:
        self._begun: tuple[pb.ExchangeResponse, PayloadAssembler] | None = None

    def add(self, response: pb.ExchangeResponse) -> Answer | None:
        """Add a response; returns the answer that it completes, None if parts are missing.

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
            joining = PayloadAssembler(response.result.payload if kind == "result" else response.owned.payload)
        self._begun = None if joining.complete else (first, joining)
        return Answer(first, joining.data) if joining.complete else None
