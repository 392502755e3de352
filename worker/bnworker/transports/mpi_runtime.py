"""MPI in this process: loaded on import, finalized at the normal end of the process that loaded it.

A process that is forked from a rank must not finalize: MPI would take it for the rank. mpi4py finalizes at the very end
of every process, forked children included, where nothing can stop it any more; so that is done here instead, unless
the program has loaded mpi4py before.
"""

from __future__ import annotations

import atexit
import os
import sys

from bnworker import failure_marker

__all__ = ["MPI", "PROCESS"]

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


def _finalize() -> None:
    if os.getpid() != PROCESS:
        return
    failure_marker.closed("mpi")
    if _FINALIZES and not MPI.Is_finalized():
        MPI.Finalize()


# Open until the process ends normally, even if it finalizes MPI by itself: MPICH signs off from mpiexec only in its
# library's destructor, which os._exit skips.
failure_marker.opened("mpi")
atexit.register(_finalize)
