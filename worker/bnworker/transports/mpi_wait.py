"""Waiting for MPI: until a deadline, without burning a core, and with the names of the missing ranks at the end.

A blocking collective never times out, so every wait tests a request. A rank that has waited for half its time
sends every other rank a note of where it waits; a rank that gets a note about its own exchange answers with one.
A rank that has sent none by the deadline is missing. The first rank to find that out notifies the others, so all
raise the same error.

Laws:
1. A wait ends by its deadline, whatever the other ranks do.
2. A rank that waits in this exchange or a later one is never blamed.
3. After a wait that did not complete, the communicator can't be used any more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVarTuple, Unpack

import numpy as np
from mpi4py import MPI

from bnlayer.agreement import Peer, Verdict, check_agreement
from bnlayer.collective import Call, Direction, ExchangeKey, Operation, PlainSignature
from bnlayer.errors import CollectiveError, PeerLostError

Ts = TypeVarTuple("Ts")

_SPINS = 256  # tests in a row, 15 to 50 µs: a small collective between running ranks takes 2 to 12
_YIELD_S = 1e-3  # ranks of one step are rarely further apart; yielding costs nothing when cores are free
_SLEEP_SHARE = 0.05  # of the time waited so far: a late answer is seen at most this much later
_LONGEST_SLEEP_S = 2e-3
_TAG = 1

# MPI may still write into the buffers of a request that was given up, and they live as long as it does.
_abandoned: list[MPI.Request] = []


@dataclass(slots=True)
class Wait:
    """One exchange's wait, which may take several requests.

    Attributes:
        exchange_number: number of the exchange, the same on every rank.
        call: what this rank waits for; None when it is leaving.
        timeout: seconds that the whole exchange may take.
        start: when it began, on the monotonic clock.
        last: the exchange before, which all ranks took part in; None if this is the first.
        announced: whether the other ranks have a note of it.
    """

    exchange_number: int
    call: Call | None
    timeout: float
    start: float
    last: Call | None = None
    announced: bool = False


def complete(request: MPI.Request, start: float, check: Callable[[Unpack[Ts], float], None], *arguments: *Ts) -> None:
    """Return when a request has completed.

    Args:
        request: what to wait for.
        start: when its exchange began, on the monotonic clock.
        check: called now and then with the arguments, and the seconds since then; ends the wait by raising.
        arguments: for it.

    Raises:
        PeerLostError: MPI itself has failed.
    """
    try:
        test = request.Test
        for _ in range(_SPINS):
            if test():
                return
        _poll(request, start, check, *arguments)
    except MPI.Exception as error:
        _abandoned.append(request)
        raise PeerLostError(f"MPI failed, a rank may have crashed: {error}.") from error
    except BaseException:
        _abandoned.append(request)
        raise


def _poll(request: MPI.Request, start: float, check: Callable[[Unpack[Ts], float], None], *arguments: *Ts) -> None:
    yield_until = time.monotonic() + _YIELD_S
    while not request.Test():
        now = time.monotonic()
        if now < yield_until:
            os.sched_yield()
            continue
        check(*arguments, now - start)
        time.sleep(min(_LONGEST_SLEEP_S, _SLEEP_SHARE * (now - start)))


class NoteExchange:
    """Exchanges notes with the other ranks while one waits on a communicator, and ends a wait at its deadline.

    Args:
        comm: a communicator of the transport's own.
        peers: how errors name the ranks.
    """

    def __init__(self, comm: MPI.Intracomm, peers: Sequence[Peer]) -> None:
        self._comm = comm
        self._peers = {peer.rank: peer for peer in peers}
        self._notes: dict[int, tuple[int, Call | None]] = {}
        self._verdict: tuple[int, Verdict] | None = None
        self._sends: list[MPI.Request] = []

    def drain(self) -> None:
        """Receive the notes that crossed an exchange which completed after all."""
        self._read_notes()
        MPI.Request.Testall(self._sends)

    def look_around(self, wait: Wait, waited: float) -> None:
        """Receive other ranks' notes about a wait, and send this one's; for `complete`.

        Raises:
            PeerLostError: the wait has timed out, here or on another rank.
        """
        self._read_notes()
        if self._verdict is not None and self._verdict[0] == wait.exchange_number:
            raise self._verdict[1].error(wait.call)
        asked = any(number == wait.exchange_number for number, _ in self._notes.values())
        if not wait.announced and (asked or waited >= wait.timeout / 2):
            wait.announced = True
            self._send_note(wait, None, range(self._comm.size))
        if waited >= wait.timeout:
            raise self._overdue(wait)

    def _overdue(self, wait: Wait) -> CollectiveError:
        here = {rank: call for rank, (number, call) in self._notes.items() if number >= wait.exchange_number}
        here[self._comm.rank] = wait.call
        seen = f"completing {wait.last.where}" if wait.last is not None else "joining"
        absent = f"did not come within {wait.timeout:g} s (last seen {seen})"
        missing = {rank: absent for rank in self._peers if rank not in here}
        waiting = {rank: call for rank, call in here.items() if call is not None}
        verdict = check_agreement(waiting, missing, self._peers) if missing else None
        if verdict is None:
            text = f"All ranks came, but MPI did not complete their exchange within {wait.timeout:g} s."
            verdict = Verdict(PeerLostError, text, ())
        self._send_note(wait, verdict, sorted(here))
        return verdict.error(wait.call)

    def _send_note(self, wait: Wait, verdict: Verdict | None, ranks: Sequence[int]) -> None:
        call = wait.call
        where = None if call is None else [call.operation, *_key_fields(call.key)]
        verdict_fields = None if verdict is None else [verdict.text, verdict.ranks]
        note = np.frombuffer(json.dumps([wait.exchange_number, where, verdict_fields]).encode(), np.uint8)
        for rank in ranks:
            if rank != self._comm.rank:
                self._sends.append(self._comm.Isend(note, rank, _TAG))

    def _read_notes(self) -> None:
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, _TAG, status):
            buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._comm.Recv(buffer, status.source, _TAG)
            number, where, verdict_fields = json.loads(buffer.tobytes())
            self._notes[status.source] = (number, None if where is None else _call(*where))
            if verdict_fields is not None:
                self._verdict = (number, Verdict(PeerLostError, verdict_fields[0], tuple(verdict_fields[1])))


def _key_fields(key: ExchangeKey) -> tuple[str | None, str | None, int]:
    return key.layer, key.direction, key.step


def _call(operation: str, layer: str | None, direction: str | None, step: int) -> Call:
    """A call as a note describes it: its key, without the signature."""
    key = ExchangeKey(layer, None if direction is None else Direction(direction), step)
    return Call(Operation(operation), key, PlainSignature())
