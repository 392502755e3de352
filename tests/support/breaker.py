"""Ends ranks' connections to the service after so much progress, never after so much time."""

from __future__ import annotations

import itertools
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from bnworker.transports.local import LocalSocket
from bnworker.transports.stream import Stream

_LONGEST_LIFE = 60  # uses: some 20 exchanges


class Breaker:
    """Ends the local socket of a connection, or all of it, from a thread of its own, once it has been of use.

    When is drawn as a number of things that a rank did with the socket, of which the first four are an answer and the
    next request: every connection gets the job on, however slow the machine is.
    """

    def __init__(self, seed: int) -> None:
        self.streams: list[Stream] = []
        self.ended = {"socket": 0, "connection": 0}
        self._rng = np.random.default_rng(seed)
        self._due: SimpleQueue[LocalSocket | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def socket(self, *arguments: Any) -> LocalSocket:
        """A local socket that ends sooner or later."""
        made = LocalSocket(*arguments)
        left = itertools.count(int(self._rng.integers(4, _LONGEST_LIFE)), -1)
        send, hear = made.send, made.hear

        def used() -> None:
            if next(left) == 0:
                self._due.put(made)

        def counted_send(*arguments: Any) -> None:
            used()  # it sends
            send(*arguments)
            used()  # it waits

        def counted_hear(timeout: float) -> Any:
            answer = hear(timeout)
            if answer is not None:
                used()  # it computes
            return answer

        made.send, made.hear = counted_send, counted_hear  # type: ignore[method-assign]
        return made

    def close(self) -> None:
        """End its thread."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        for mine in iter(self._due.get, None):
            connections = [stream._connection for stream in self.streams]
            for connection in connections:
                if connection is not None and connection.socket is mine:
                    alone = self._rng.random() < 0.5
                    self.ended["socket" if alone else "connection"] += 1
                    mine.end() if alone else connection.cut()
