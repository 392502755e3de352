"""Waiting for a process group: until a deadline, and with an eye on the log in its store (`torch_events.py`).

Where an exchange can't complete, each rank that waits in it writes its call into the log. One that has seen all of
them, or has waited long enough for the rest, decides and writes a verdict; whoever reads it raises it. The first
verdict in the log counts, so all ranks raise the same error.

Laws:
1. A wait ends by its deadline, whatever the other ranks do.
2. A rank that waits in this exchange or a later one is never blamed.
3. After a wait that did not complete, the group can't be used any more.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bnlayer import errors
from bnlayer.agreement import Peer, Verdict, check_agreement
from bnlayer.collective import Call
from bnlayer.errors import CollectiveError, PeerLostError
from bnworker.transports.call_encoding import decode_call, encode_call
from bnworker.transports.torch_events import LEFT, VERDICT, WAITS, EventLog, StoreLostError

_SLICE_S = 0.02  # of a wait; then a look into the log, which takes 0.1 ms
_GRACE_S = 0.4  # in which the other ranks say where they wait, once it is clear that an exchange can't complete
_LOOK_S = 2e-3
_FAREWELL_S = 1.0  # for the others to know that this rank leaves, before its connections break


@dataclass(slots=True)
class Wait:
    """One exchange's wait, which may take several messages.

    Attributes:
        exchange_number: number of the exchange, the same on every rank.
        call: what this rank waits for.
        shape: of the limbs that belong to the call, as text.
        pushed: what was pushed into this rank's mirror of the layer.
        timeout: seconds that the whole exchange may take.
        start: when it began, on the monotonic clock.
        last: the exchange before, which all ranks took part in; None if this is the first.
        announced: whether the other ranks can read of it in the log.
    """

    exchange_number: int
    call: Call
    shape: str
    pushed: str
    timeout: float
    start: float
    last: Call | None = None
    announced: bool = False


class Watch:
    """Waits for a group's messages.

    Args:
        group: whose messages.
        log: of this world.
        rank: this one.
        peers: how errors name the ranks.
    """

    def __init__(self, group: Any, log: EventLog, rank: int, peers: Sequence[Peer]) -> None:
        self._group, self._log, self._rank = group, log, rank
        self._peers = {peer.rank: peer for peer in peers}
        self._left: dict[int, tuple[int, str]] = {}
        self._waiting: dict[int, tuple[int, Call]] = {}
        self._verdict: Verdict | None = None
        self._is_gloo = isinstance(group, dist.ProcessGroupGloo)
        self._next = 0  # the exchange that this rank has not completed

    def complete(self, begin: Callable[[], Any], wait: Wait) -> None:
        """Begin a message and return when it has completed.

        Raises:
            CollectiveError: it can't complete.
        """
        self._next = wait.exchange_number
        work = None
        try:
            work = begin()
            while not self._has_completed(work):
                self._look_around(wait)
        except CollectiveError:
            _never_destroy(self._group)
            raise
        except RuntimeError as error:
            text = str(error).strip().partition("\n")[0].partition(". ")[0]
            raise self._agreed_error(wait, f"crashed or was killed: its connection broke ({text})") from error
        except BaseException:  # Ctrl-C
            _never_destroy(self._group)
            raise
        self._next = wait.exchange_number + 1

    def disagreement(self, wait: Wait) -> CollectiveError:
        """The error where every rank has seen that the calls differ."""
        self._next = wait.exchange_number
        return self._agreed_error(wait, "sent no call")

    def leave(self, reason: str) -> None:
        """Tell the others, and wait until all have left or failed too; for a second at most."""
        with suppress(StoreLostError):
            self._log.write(LEFT, self._rank, self._next, reason)
            end = time.monotonic() + _FAREWELL_S
            while time.monotonic() < end and self._verdict is None and len(self._left) < len(self._peers):
                self._read()
                time.sleep(_LOOK_S)

    # ---- while a message is under way ----

    def _has_completed(self, work: Any) -> bool:
        """Wait for a slice of time.

        Raises:
            RuntimeError: the message has failed.
        """
        if self._is_gloo:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
            except RuntimeError:  # the slice has passed, or the message has failed
                if not work.is_completed():
                    return False
                work.wait()  # it may have completed since; if it has failed, this says how
            return True
        end = time.monotonic() + _SLICE_S
        while not work.is_completed():
            if time.monotonic() >= end:
                return False
            os.sched_yield()
        work.wait()
        return True

    def _look_around(self, wait: Wait) -> None:
        waited = time.monotonic() - wait.start
        try:
            self._read()
            if self._verdict is not None or self._absent(wait):
                raise self._agreed_error(wait, "did not answer")
            if waited >= wait.timeout / 2:
                self._announce(wait)
        except StoreLostError as error:
            raise self._orphaned(wait, error) from error
        if waited >= wait.timeout:
            seen = f"completing {wait.last.where}" if wait.last is not None else "joining"
            raise self._agreed_error(wait, f"did not come within {wait.timeout:g} s (last seen {seen})")

    def _absent(self, wait: Wait) -> dict[int, str]:
        """The ranks that have left before completing an exchange, and why."""
        return {rank: reason for rank, (number, reason) in self._left.items() if number <= wait.exchange_number}

    def _agreed_error(self, wait: Wait, missing_why: str) -> CollectiveError:
        """The error that all ranks raise.

        Args:
            wait: of the exchange.
            missing_why: what to say of a rank that neither waits nor has left.
        """
        try:
            self._announce(wait)
            end = time.monotonic() + _GRACE_S
            while True:
                self._read()
                if self._verdict is not None:
                    return self._verdict.error(wait.call)
                here = {rank: call for rank, (number, call) in self._waiting.items() if number >= wait.exchange_number}
                missing = self._peers.keys() - here.keys() - self._absent(wait).keys()
                if not missing or time.monotonic() >= end:
                    self._decide(here, missing, missing_why, wait)
                else:
                    time.sleep(_LOOK_S)
        except StoreLostError as error:
            return self._orphaned(wait, error)

    def _decide(self, here: dict[int, Call], missing: Set[int], missing_why: str, wait: Wait) -> None:
        # Where a rank is known to have left, others that have not come yet are not to blame.
        left = self._absent(wait) or dict.fromkeys(self._to_blame(missing), missing_why)
        verdict = check_agreement(here, left, self._peers)
        if verdict is None:
            text = f"All ranks came, but the process group did not complete {wait.call.where}."
            verdict = Verdict(PeerLostError, text, ())
        self._log.write(VERDICT, self._rank, verdict.kind.__name__, verdict.text, verdict.ranks)

    def _to_blame(self, missing: Set[int]) -> Set[int]:
        """Of the ranks that are missing those that are known to be dead; all of them where none is."""
        host = socket.gethostname()
        dead = {rank for rank in missing if self._peers[rank].host == host and not _is_running(self._peers[rank].pid)}
        return dead or missing

    def _orphaned(self, wait: Wait, error: StoreLostError) -> CollectiveError:
        text = (
            f"A rank has crashed or left, most likely rank 0, which brought the process group together: {error}. "
            f"rank {self._rank} waits in {wait.call.where}."
        )
        return Verdict(PeerLostError, text, ()).error(wait.call)

    def _announce(self, wait: Wait) -> None:
        if not wait.announced:
            wait.announced = True
            text = encode_call(wait.call, wait.shape, wait.pushed).decode()
            self._log.write(WAITS, self._rank, wait.exchange_number, text)

    def _read(self) -> None:
        for kind, rank, *contents in self._log.unread():
            if kind == LEFT:
                self._left[rank] = contents[0], contents[1]
            elif kind == WAITS:
                self._waiting[rank] = contents[0], decode_call(contents[1].encode())
            elif kind == VERDICT and self._verdict is None:
                name, text, ranks = contents
                self._verdict = Verdict(getattr(errors, name), text, tuple(ranks))


def _is_running(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _never_destroy(group: Any) -> None:
    """Keep a group until the process ends: its destructor would wait for an unfinished message."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
