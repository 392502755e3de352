"""The channel that every connection begins with: the gRPC stream on which its rank joined.

It is also the only way to say why a connection ends: a status with the error, which gRPC delivers as the stream's last
word. A task of gRPC's own carries out `write`, so a rank that reads slowly delays only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc.aio

from bnproto.failures import DETAILS_KEY, StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.failpoints import Failpoints
from bnserver.rank_channel import Outgoing

Context = grpc.aio.ServicerContext[pb.ExchangeRequest, pb.ExchangeResponse]
Requests = AsyncIterator[pb.ExchangeRequest]


async def abort(context: Any, status: StatusParts) -> None:
    """End a call with an error; never returns.

    Args:
        context: of any call.
        status: why.

    Raises:
        grpc.aio.AbortError: always.
    """
    await context.abort(status.code, status.message, ((DETAILS_KEY, status.details),))


class GrpcChannel:
    """One stream.

    Attributes:
        outgoing: what is to be written; the last item is a status, or None for a clean end.
        unread: how many answers were sent since there was last nothing left to write.
    """

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[pb.ExchangeResponse | StatusParts | None] = asyncio.Queue()
        self.unread = 0
        self._is_closed = False

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages after those before."""
        if self._is_closed:
            return
        self.unread += 1
        for message in messages:
            self.outgoing.put_nowait(message.message)

    def close(self, status: StatusParts | None) -> None:
        """End the stream, after what was sent: with an error, or None for a clean end."""
        if not self._is_closed:
            self._is_closed = True
            self.outgoing.put_nowait(status)

    async def write(self, context: Context, failpoints: Failpoints) -> None:
        """Write what is sent until the stream ends.

        Raises:
            grpc.aio.AbortError: it ends with an error.
        """
        while True:
            if self.outgoing.empty():
                self.unread = 0
            message = await self.outgoing.get()
            if isinstance(message, pb.ExchangeResponse):
                if failpoints.active and failpoints.reached("before-reply"):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped on purpose")
                await context.write(message)
                if failpoints.active:
                    failpoints.reached("after-reply")
            elif message is None:
                return
            else:
                await abort(context, message)
