"""What ranks tell each other beside their exchanges: an append-only log in the process group's store.

A collective of a process group is silent about who is missing: it returns, or it times out after minutes. So a rank
that leaves or fails writes that into the store which brought the group together, and a rank that waits looks there.

Laws:
1. Every rank reads the events in the same order, so all can act on the first verdict and raise the same error.
2. A store that is gone says nothing more; it never turns a clean end into a failure.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from bnlayer.agreement import Peer
from bnlayer.errors import PeerLostError

LEFT, WAITS, VERDICT = "left", "waits", "verdict"

_LOOK_S = 2e-3  # between two looks for the other ranks' names while joining


class StoreLostError(Exception):
    """The store can't be reached: the process that holds it has ended."""


class EventLog:
    """One world's log.

    Args:
        store: a `torch.distributed.Store` of this world alone; this object is its only user.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._read = 0

    def write(self, kind: str, rank: int, *contents: object) -> None:
        """Append an event.

        Raises:
            StoreLostError: the store is gone.
        """
        text = json.dumps([kind, rank, *contents])
        number = self._asked(lambda: self._store.add("events", 1))
        self._asked(lambda: self._store.set(f"event/{number}", text))

    def unread(self) -> list[list[Any]]:
        """The events since the last call, in order.

        Raises:
            StoreLostError: the store is gone.
        """
        events = []
        while self._asked(lambda: self._store.check([f"event/{self._read + 1}"])):
            self._read += 1
            events.append(json.loads(self._asked(lambda: self._store.get(f"event/{self._read}"))))
        return events

    def meet(self, rank: int, world_size: int, timeout: float) -> list[Peer]:
        """Wait until every rank has come; returns how errors name them.

        Raises:
            PeerLostError: not all came in time.
        """
        start = time.monotonic()
        card = json.dumps([socket.gethostname(), os.getpid()])
        try:
            self._asked(lambda: self._store.set(f"rank/{rank}", card))
            missing = list(range(world_size))
            while missing and time.monotonic() - start < timeout:
                missing = [other for other in missing if not self._has_come(other)]
                if missing:
                    time.sleep(_LOOK_S)
        except StoreLostError as error:
            raise PeerLostError(f"rank {rank} could not join over torch.distributed: {error}.") from error
        if missing:
            who = ", ".join(map(str, missing))
            raise PeerLostError(
                f"rank {rank} has joined, but within {timeout:g} s {'rank' if len(missing) == 1 else 'ranks'} {who} of "
                f"the {world_size} of the process group did not. Every rank must join, or call its first layer.",
                ranks=tuple(missing),
            )
        return [Peer(other, *json.loads(self._store.get(f"rank/{other}"))) for other in range(world_size)]

    def _has_come(self, rank: int) -> bool:
        return bool(self._asked(lambda: self._store.check([f"rank/{rank}"])))

    @staticmethod
    def _asked(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError as error:  # torch's DistError and its children are
            raise StoreLostError(f"its store is gone ({str(error).partition(chr(10))[0][:100]})") from error
