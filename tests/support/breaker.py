"""Ends ranks' connections to the service after so much progress, never after so much time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import numpy as np

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.client import Client
from bnworker.transports.service.events import Requests
from bnworker.transports.service.local_channel import LocalChannel
from bnworker.transports.service.service_channel import Answer

_ATTACHING = 3  # uses, in which the service takes a socket
_OF_USE = 4  # uses: a request goes out, is out, is answered; and the next one goes out
_LONGEST_LIFE = 60  # uses: some 20 exchanges


class _Fragile(LocalChannel):
    """A local socket that tells when it was used so many times."""

    def __init__(
        self, invitation: pb.LocalSocket, boot_id: int, timeout: float, life: int, over: Callable[[LocalChannel], None]
    ) -> None:
        self._left = itertools.count(life, -1)
        self._used_up = over
        super().__init__(invitation, boot_id, timeout)

    def send(self, requests: Requests) -> None:
        self._use()  # its rank sends
        super().send(requests)
        self._use()  # it waits

    def receive(self, timeout: float) -> Answer | None:
        answer = super().receive(timeout)
        if answer is not None:
            self._use()  # it computes
        return answer

    def _use(self) -> None:
        if next(self._left) == 0:
            self._used_up(self)


class Breaker:
    """Ends the local socket of a connection, or all of it, from a thread of its own, once it has been of use.

    When is drawn as a number of uses, of which the first ones get the job on, however slow the machine is.

    Args:
        seed: of the moments.

    Attributes:
        clients: of the ranks whose connections it breaks.
        ended: how often it ended what.
    """

    def __init__(self, seed: int) -> None:
        self.clients: list[Client] = []
        self.ended = {"socket": 0, "connection": 0}
        self._rng = np.random.default_rng(seed)
        self._due: SimpleQueue[LocalChannel | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def channel(self, invitation: pb.LocalSocket, boot_id: int, timeout: float) -> LocalChannel:
        """A local socket that ends sooner or later."""
        life = _ATTACHING + int(self._rng.integers(_OF_USE, _LONGEST_LIFE))
        return _Fragile(invitation, boot_id, timeout, life, self._due.put)

    def close(self) -> None:
        """End its thread."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        for mine in iter(self._due.get, None):
            for connection in [client._connection for client in self.clients]:
                if connection is not None and connection.channel is mine:
                    alone = self._rng.random() < 0.5
                    self.ended["socket" if alone else "connection"] += 1
                    mine.close() if alone else connection.cut()
