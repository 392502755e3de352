"""uvicorn's HTTP, with bounds on who connects and asks for nothing.

uvicorn gives a connection some seconds after each answer, but all the time in the world before its first request, and
to finish one that it has begun; and it answers above its limit, yet never stops accepting. Each connection takes a file
of the service, and a place from a viewer.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

ASK_WITHIN_S = 5.0
MOST = 128  # at a time: twice the viewers, so that those above their number are told so


class BoundedHttp(H11Protocol):
    """One connection: it asks for something in each 5 s, or gets its answer meanwhile; or it is closed."""

    _answered: object = None  # the request that was the latest one 5 s ago, and is answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, if there are not too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.abort()
            return
        self.loop.call_later(ASK_WITHIN_S, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        cycle = getattr(self, "cycle", None)
        if cycle is None or cycle.response_complete:
            if cycle is self._answered:
                self.transport.abort()
                return
            self._answered = cycle
        self.loop.call_later(ASK_WITHIN_S, self._look)
