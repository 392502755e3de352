"""One rank's exchanges: one at a time, numbered and counted, and none after the error that ends its world.

Laws:
1. A `CollectiveError` ends the world: every later exchange raises it again at once.
2. An exchange that was cut off by any other exception ends it too: the ranks are out of step.
3. A process that was forked from a rank can't exchange in its place.
4. What is refused before anything is sent leaves no trace: numbers and counters advance when an exchange begins.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from bnlayer.collective import Call, ExchangeKey, Operation, PlainSignature
from bnlayer.errors import CollectiveError
from bnworker import failure_marker
from bnworker.statistics import Statistics
from bnworker.transports import Transport

T = TypeVar("T")


class Exchanges:
    """What a world makes its exchanges with.

    Args:
        world: whose; errors show it.
        transport: this rank's end of them.
        statistics: where they are counted.

    Attributes:
        error: the one that ended the world; None while it goes on.
        left: whether this rank has left the world.
        plain_count: how many plain exchanges were begun: the number of the next one.
    """

    def __init__(self, world: object, transport: Transport, statistics: Statistics) -> None:
        self.error: CollectiveError | None = None
        self.left = False
        self.plain_count = 0
        self._world = world
        self._transport = transport
        self._statistics = statistics
        self._free = threading.Lock()
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child of the rank's process; always False in a world of one, which any may use."""
        return os.getpid() != self._process and self._transport.name != "alone"

    def check(self) -> None:
        """Raise if this process can't make an exchange.

        Raises:
            CollectiveError: the world is over, or belongs to the process from which this one was forked.
            RuntimeError: it was left.
        """
        if os.getpid() != self._process and self.is_forked:
            rank = self._transport.rank
            raise CollectiveError(
                f"Process {os.getpid()} was forked from rank {rank} (pid {self._process}), which has joined its "
                "job: a rank is one process. Make exchanges there, or start processes before joining.",
                ranks=(rank,),
            )
        if self.error is not None:
            raise self.error.copy_for_raise()
        if self.left:
            raise RuntimeError(f"{self._world!r}: this world was left; make exchanges inside `with bnworker.join()`.")

    def plain(
        self,
        operation: Operation,
        signature: PlainSignature,
        sent: int,
        action: Callable[[Call], T],
        received: Callable[[T], int],
    ) -> T:
        """Make the next plain exchange. Its number is taken only after all checks have passed."""

        def numbered() -> T:
            call = Call(operation, ExchangeKey(None, None, self.plain_count), signature)
            self.plain_count += 1
            return self.counted(call, sent, lambda: action(call), received)

        return self.run(numbered)

    def counted(self, call: Call, sent: int, action: Callable[[], T], received: Callable[[T], int]) -> T:
        """Count an exchange of so many bytes, and the time that it takes; within `run`."""
        self._statistics.bytes_sent += sent
        start = time.perf_counter()
        try:
            result = action()
        finally:
            self._statistics.waiting_seconds += time.perf_counter() - start
        self._statistics.completed(call, received(result))
        return result

    def run(self, action: Callable[[], T]) -> T:
        """Run an action on the transport, one at a time, and keep the error that ends the world.

        Raises:
            CollectiveError: as the action does, or as `check`.
            RuntimeError: another one is not complete yet, or the world was left.
            OverflowError: as the action does, on every rank: the world goes on.
        """
        if not self._free.acquire(blocking=False):
            self.check()
            raise RuntimeError(
                f"{self._world!r}: a second exchange was begun before the first one was complete. A rank makes one "
                "exchange at a time: call layers and the world from one thread, and not from a signal handler."
            )
        try:
            self.check()
            try:
                return action()
            except CollectiveError as error:
                self.error = error
                failure_marker.mark()
                raise
            except OverflowError:  # every rank gets this error: they stay in step
                raise
            except BaseException as error:
                self.error = CollectiveError(
                    f"An exchange of rank {self._transport.rank} was cut off by {type(error).__name__} before it was "
                    "complete: the ranks are out of step, and this world is over. Leave it, and join anew.",
                    ranks=(self._transport.rank,),
                )
                raise
        finally:
            self._free.release()
