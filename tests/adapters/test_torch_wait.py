"""Waiting for a message of a process group: what its work says at odd moments."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from bnlayer.agreement import Peer
from bnlayer.collective import Call, ExchangeKey, Operation, PlainSignature
from bnlayer.errors import PeerLostError
from bnworker.transports.torch_events import EventLog
from bnworker.transports.torch_wait import Wait, Watch


class Work:
    """A message that says this of itself, one after the other, and then that its time has passed; errors are raised."""

    def __init__(self, waits: list[str | None], completed: bool) -> None:
        self._waits, self._completed = waits, completed

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait."""
        error = self._waits.pop(0) if self._waits else "Operation timed out!"
        if error is not None:
            raise RuntimeError(error)

    def is_completed(self) -> bool:
        """Whether it has."""
        return self._completed


def _watch(world_size: int = 2) -> Watch:
    log = EventLog(dist.HashStore())
    peers = [Peer(rank, "elsewhere", 1) for rank in range(world_size)]
    watch = Watch(None, log, 0, peers)
    watch._is_gloo = True
    return watch


def _wait(timeout: float = 60.0) -> Wait:
    call = Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature())
    return Wait(0, call, "", "nothing", timeout, time.monotonic())


def test_a_message_that_completes_as_its_slice_passes_has_completed() -> None:
    """gloo says "timed out" of the wait, and then that the work is done: that is no failure."""
    _watch().complete(lambda: Work(["Operation timed out!", None], completed=True), _wait())


def test_a_message_that_failed_names_who_is_missing() -> None:
    """Nobody else has written anything, and nothing is known of the other's process: its connection is what broke."""
    with pytest.raises(
        PeerLostError, match=r"rank 1 \(host elsewhere, pid 1\) crashed or was killed.*Connection closed"
    ):
        _watch().complete(lambda: Work(["Connection closed by peer. More", "Connection closed by peer"], True), _wait())


def test_a_wait_ends_by_its_deadline() -> None:
    """And says who did not come."""
    with pytest.raises(PeerLostError, match=r"rank 1 .* did not come within 0.01 s \(last seen joining\)"):
        _watch().complete(lambda: Work([], completed=False), _wait(0.01))


def test_a_rank_that_left_after_this_exchange_is_no_failure() -> None:
    """It has completed its part; the message is only slow to arrive here."""
    watch = _watch()
    watch._log.write("left", 1, 1, "")
    watch.complete(lambda: Work(["Operation timed out!"] * 3 + [None], completed=False), _wait())
