"""An MPI job whose ranks go on when others die, by Open MPI's user-level failure mitigation (ULFM).

Under `mpirun --with-ft ulfm` the death of a rank ends neither the job nor the others: their exchanges with it fail. The
communicator is then revoked, and shrunk to the ranks that are left, which are the next generation.

Laws:
1. A rank that notices a loss revokes the communicator, so the next exchange of each of the others fails as well.
2. An exchange may complete on some ranks and fail on others. Where that must not be, when ranks are admitted, an
   agreement follows, which has the same result on all that are left. After whatever failed each rank takes part in one
   more, so all make the same agreements on a communicator, and then shrink it.
3. A new communicator is not used before all have agreed that all have it: Open MPI 5.0 crashes a rank that hears of
   the revocation of one that it is still making.
4. A rank that leaves the others with a failure, or in the middle, ends by SIGKILL: of a process that exits before MPI
   is finalized Open MPI tells the others nothing, and to finalize it would wait for them. All others just end.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from bnlayer.agreement import Peer, listed
from bnlayer.collective import ADMIT, Call, PlainSignature
from bnlayer.errors import MismatchError, PeerLostError, RegroupError
from bnworker.limits import Limits
from bnworker.transports import mpi_runtime, peers
from bnworker.transports.mpi import MPITransport
from bnworker.transports.mpi_runtime import MPI, PROCESS
from bnworker.transports.mpi_wait import Wait, complete

_LOSSES = frozenset({MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED})
_CARD = 512  # bytes in which a rank gives its host, process id and limits


class RecoverableTransport(MPITransport):
    """One rank of a generation of an elastic job; `formed` makes it.

    Args:
        comm: a communicator of its own.
        generation: its number.
        limits: how many ranks the job may have, the same on every rank.
        timeout: seconds that joining, and each exchange, may take.

    Raises:
        RegroupError: a rank was lost meanwhile.
        MismatchError: the ranks disagree on the limits.
        PeerLostError: not all ranks came in time.
    """

    def __init__(self, comm: MPI.Intracomm, generation: int, limits: Limits, *, timeout: float) -> None:
        self.generation = generation
        self._limits = limits
        self._lost = False  # a rank was, and the others have to form the next generation
        self._closed = False  # the communicator's last agreement was made
        self._overdue = False  # a rank did not come, and is not known to be dead: the whole job has to end
        self._others_go_on = False
        super().__init__(comm, timeout=timeout, deterministic=True)

    # ---- the transport ----

    def barrier(self, call: Call) -> None:
        """Return when every rank has called it; where ranks are admitted, on all that are left or on none.

        Raises:
            RegroupError: a rank was lost.
        """
        super().barrier(call)
        if call.signature != PlainSignature(ADMIT):
            return
        with self._unsound_unless_completed():
            everywhere = agreed(self._comm, True, self._until_overdue, time.monotonic())
        if not everywhere:
            self._closed = True
            raise self._loss(call)

    def leave(self, reason: str) -> None:
        """Notify the others, and wait until all have received it; after a failure this process has to end."""
        if self._over or self._overdue:
            return
        if self._sound:
            with suppress(MPI.Exception):
                super().leave(reason)
            in_order = self._over and not self._lost and not self._others_go_on
            self._lost = False
        else:  # an exchange was cut off
            in_order, reason = False, reason or "an exchange was cut off"
        if reason and not in_order:
            self._over = self._sound = True
            self._overdue = False
            mpi_runtime.end_by_signal(self.rank)

    def closed(self) -> MPI.Intracomm:
        """The communicator, after its last agreement: every rank that is left may shrink it.

        Raises:
            PeerLostError: not all of them came in time.
        """
        atexit.unregister(self._at_exit)
        if not self._closed:
            agreed(self._comm, False, self._until_overdue, time.monotonic())
        self._lost, self._closed = False, True
        return self._comm

    def named(self, comm: MPI.Intracomm) -> list[Peer]:
        """The ranks that are not in a later communicator."""
        group = self._comm.Get_group()
        return [self._peers[rank] for rank in _translated(MPI.Group.Difference(group, comm.Get_group()), group)]

    # ---- losses ----

    @contextmanager
    def _noticing(self, call: Call | None) -> Iterator[None]:
        """Make a `RegroupError` of the loss of a rank."""
        try:
            yield
        except MPI.Exception as error:
            if not self._follows_from_loss(error):
                raise
            raise self._loss(call) from error
        except PeerLostError as error:
            if self._follows_from_loss(error.__cause__):
                raise self._loss(call) from error
            if not self._over:
                self._overdue = True
                raise
            self._lost = True  # it left with a failure: all have agreed on that, and it ends
            raise RegroupError(str(error), ranks=error.ranks, layer=error.layer, step=error.step) from error

    def _follows_from_loss(self, error: BaseException | None) -> bool:
        """Whether a rank was lost, even if the error does not say so.

        A collective of Open MPI 5.0 whose communicator is revoked between two rounds of its schedule fails with
        MPI_ERR_OTHER.
        """
        if not isinstance(error, MPI.Exception):
            return False
        return _is_loss(error) or self._comm.Is_revoked() or self._comm.Get_failed().size > 0

    def _loss(self, call: Call | None) -> RegroupError:
        """Revoke the communicator; the error that says why."""
        with suppress(MPI.Exception):
            self._comm.Revoke()
        self._lost = self._over = self._sound = True
        ranks: list[int] = []
        with suppress(MPI.Exception):  # what this rank knows by now
            ranks = _translated(self._comm.Get_failed(), self._comm.Get_group())
        who = _names([self._peers[rank] for rank in ranks]) or "a rank"
        where = "leaving" if call is None else call.where
        key = None if call is None else call.key
        return RegroupError(
            f"{who} was lost, and rank {self.rank} can't complete {where}: those that are left join anew.",
            ranks=tuple(ranks),
            layer=None if key is None else key.layer,
            step=None if key is None else key.step,
        )

    def _agree(self, call: Call | None, shape: tuple[int, ...] | None = None, reason: str = "") -> Wait:
        with self._noticing(call):
            return super()._agree(call, shape, reason)

    def _disagree(self, call: Call | None, encoded_call: bytes, reason: str, wait: Wait) -> None:
        super()._disagree(call, encoded_call, reason, wait)
        self._others_go_on = True  # it has not raised: this rank leaves, and others don't

    def _reduced(self, array: NDArray[np.generic], op: peers.Op, wait: Wait) -> NDArray[np.generic]:
        with self._noticing(wait.call):
            return super()._reduced(array, op, wait)

    def _added_in_rank_order(self, floats: NDArray[np.float64], wait: Wait) -> NDArray[np.float64]:
        with self._noticing(wait.call):
            return super()._added_in_rank_order(floats, wait)

    def _broadcast(self, array: NDArray[np.generic], root: int, wait: Wait) -> None:
        with self._noticing(wait.call):
            super()._broadcast(array, root, wait)

    # ---- the beginning and the end ----

    def _meet(self, base: MPI.Intracomm) -> tuple[MPI.Intracomm, list[Peer]]:
        """Gather the peers' names."""
        self._comm, self._peers = base, [Peer(rank) for rank in range(self.world_size)]
        mine = [socket.gethostname()[: _CARD // 4], os.getpid(), str(self._limits)]
        cards = np.empty((self.world_size, _CARD), np.uint8)
        try:
            with self._noticing(None):
                request = base.Iallgather(np.frombuffer(json.dumps(mine).encode().ljust(_CARD), np.uint8), cards)
                self._complete_joining(request, time.monotonic())
        except RegroupError:
            atexit.unregister(self._at_exit)
            raise
        met = [json.loads(row.tobytes()) for row in cards]
        given = {limits for *_, limits in met}
        if len(given) > 1:
            self._over = True
            raise MismatchError(
                f"The ranks disagree on how many they may be (MIN:MAX): {', '.join(sorted(given))}. "
                "Give the same min= and max= on every rank."
            )
        return base, [Peer(rank, host, pid) for rank, (host, pid, _) in enumerate(met)]

    def _until_overdue(self, waited: float) -> None:
        if waited >= self._timeout:
            self._overdue = True
            raise _overdue(self._timeout)

    def _at_exit(self) -> None:
        if self._lost and os.getpid() == PROCESS:
            mpi_runtime.end_by_signal(self.rank)  # the others wait for it
        elif not mpi_runtime.ends_by_signal():
            super()._at_exit()


def formed(before: RecoverableTransport | None, limits: Limits, timeout: float) -> RecoverableTransport:
    """The next generation; every rank that is left calls it.

    Args:
        before: the generation of which a rank was lost; None: there was none, and all ranks of the MPI job begin.
        limits: how many ranks the job may have.
        timeout: seconds that it, and each exchange, may take.

    Raises:
        ValueError: more ranks were started than the job may have, or fewer.
        MismatchError: the ranks disagree on the limits.
        PeerLostError: fewer are left than the job needs, or not all of them came in time.
    """
    start = time.monotonic()

    def check(waited: float) -> None:
        if waited >= timeout:
            mpi_runtime.end_job()
            raise _overdue(timeout)

    rank = MPI.COMM_WORLD.rank
    mpi_runtime.skip_finalizing()
    try:
        if before is None:
            parent, generation = MPI.COMM_WORLD, 0
            agreed(parent, True, check, start)
        else:
            parent, generation = before.closed(), before.generation
        while True:
            comm = _shrunk(parent, check, start, timeout)
            generation += 1
            _refuse_size(comm, before, limits)
            try:
                return RecoverableTransport(comm, generation, limits, timeout=timeout)
            except RegroupError:  # one more was lost
                agreed(comm, False, check, start)
                parent = comm
    except (ValueError, MismatchError, PeerLostError):
        raise
    except BaseException:
        mpi_runtime.end_by_signal(rank)
        raise


def agreed(comm: MPI.Intracomm, mine: bool, check: Callable[[float], None], start: float) -> bool:
    """Whether all ranks of a communicator that are left say yes: the same on all of them, even if it is revoked.

    Args:
        comm: the communicator.
        mine: what this rank says.
        check: ends the wait by raising, given the seconds since `start`.
        start: on the monotonic clock.
    """
    flag = np.array([mine], np.int32)
    try:
        comm.Ack_failed()
        complete(comm.Iagree(flag), start, check)
    except MPI.Exception as error:  # a loss that was not acknowledged: the result is there nevertheless
        if not _is_loss(error):
            raise PeerLostError(f"MPI failed, a rank may have crashed: {error}.") from error
    except PeerLostError as error:
        if not _is_loss(error.__cause__):
            raise
    return bool(flag[0])


def _shrunk(parent: MPI.Intracomm, check: Callable[[float], None], start: float, timeout: float) -> MPI.Intracomm:
    """A communicator of the ranks that are left, all of which have just made an agreement; all of them have it.

    Open MPI 5.0 can't shrink a revoked communicator in the background (`Ishrink` fails with MPI_ERR_INTERN), and what
    can be waited for only in MPI can't be interrupted. All ranks were here a moment ago; should one freeze now, only a
    C thread still runs: it prints where this rank waits, and ends the process.
    """
    while True:
        comm: MPI.Intracomm | None = None
        faulthandler.dump_traceback_later(timeout, exit=True)
        try:
            comm = parent.Shrink()  # type: ignore[assignment]  # of an intracommunicator it is one, too
        except MPI.Exception as error:
            if not _is_loss(error):
                raise PeerLostError(f"MPI failed, a rank may have crashed: {error}.") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if agreed(parent, comm is not None, check, start) and comm is not None:
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            return comm


def _refuse_size(comm: MPI.Intracomm, before: RecoverableTransport | None, limits: Limits) -> None:
    if before is None and not limits.minimum <= comm.size <= limits.maximum:
        raise ValueError(
            f"elastic(): the MPI job has {comm.size} ranks, and may have {limits} (MIN:MAX). Start as many: over MPI "
            "none can join, and none waits for a place."
        )
    if before is not None and comm.size < limits.minimum:
        left = f"{comm.size} rank{'s are' if comm.size > 1 else ' is'} left"
        lost = before.named(comm)
        raise PeerLostError(
            f"{_names(lost)} {'was' if len(lost) == 1 else 'were'} lost: {left}, and the job needs {limits.minimum} "
            "(MIN). Over MPI none can join: start it again.",
            ranks=tuple(peer.rank for peer in lost),
        )


def _overdue(timeout: float) -> PeerLostError:
    return PeerLostError(
        f"Not all of the ranks that are left came within {timeout:g} s to agree on how to go on: one is frozen or cut "
        "off, or computes for longer than that."
    )


def _is_loss(error: BaseException | None) -> bool:
    return isinstance(error, MPI.Exception) and error.Get_error_class() in _LOSSES


def _translated(group: MPI.Group, into: MPI.Group) -> list[int]:
    return sorted(MPI.Group.Translate_ranks(group, None, into)) if group.size else []


def _names(lost: list[Peer]) -> str:
    return listed(map(str, lost), len(lost), joint=", ")
