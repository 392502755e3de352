"""MPI in this process: loaded on import, finalized at the normal end of the process that loaded it.

A process that is forked from a rank must not finalize: MPI would take it for the rank. mpi4py finalizes at the very end
of every process, forked children included, where nothing can stop it any more; so that is done here instead, unless
the program has loaded mpi4py before.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable

from bnworker import failure_marker

__all__ = ["MPI", "PROCESS", "end_by_signal", "end_job", "ends_by_signal", "skip_finalizing"]

_LOADED_BEFORE = "mpi4py.MPI" in sys.modules
try:
    import mpi4py

    _FINALIZES = not _LOADED_BEFORE and mpi4py.rc.finalize is None
    if _FINALIZES:
        mpi4py.rc.finalize = False
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # mpi4py is missing, or finds no MPI to load
    raise ImportError(
        "transport 'mpi' needs mpi4py and an MPI: pip install 'bnlayer[mpich]' brings both, "
        f"'bnlayer[mpi]' uses the MPI of this machine ({error})."
    ) from error

PROCESS = os.getpid()  # the one that is a rank

_instead: Callable[[], None] | None = None  # of finalizing


def skip_finalizing() -> None:
    """Let this process just end: one rank of a job that may have lost others.

    Where more than one was lost, about every tenth `MPI_Finalize` of Open MPI 5.0 waits for ever for the others.
    """
    if _instead is None:
        _end_by(_nothing)


def end_by_signal(rank: int) -> None:
    """End this process by SIGKILL instead of finalizing MPI: of that the other ranks are told, and go on."""
    if not ends_by_signal():
        sys.stderr.write(f"bnworker: process {rank} of the MPI job ends by SIGKILL: the others go on without it.\n")
        _end_by(_kill)


def end_job() -> None:
    """End the whole MPI job instead of finalizing MPI, which would wait for ever."""
    _end_by(_abort)


def ends_by_signal() -> bool:
    """Whether this process will neither finalize MPI nor just end."""
    return _instead not in (None, _nothing)


def _end_by(action: Callable[[], None]) -> None:
    global _instead  # noqa: PLW0603 - MPI is the process's own
    _instead = action


def _nothing() -> None:
    pass


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _abort() -> None:
    sys.stderr.write("bnworker: this rank ends the whole MPI job: finalizing MPI would wait for ever.\n")
    sys.stderr.flush()
    time.sleep(1.0)  # for the other ranks to print their errors
    MPI.COMM_WORLD.Abort(1)


def _finalize() -> None:
    if os.getpid() != PROCESS:
        return
    if _instead is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        _instead()
    failure_marker.closed("mpi")
    if _FINALIZES and _instead is None and not MPI.Is_finalized():
        MPI.Finalize()


# Open until the process ends normally, even if it finalizes MPI by itself: MPICH signs off from mpiexec only in its
# library's destructor, which os._exit skips.
failure_marker.opened("mpi")
atexit.register(_finalize)
