"""Files in the launcher's folder: what a rank tells its launcher beside its exit code, and the launcher the ranks.

    RANK.peer-failure  the rank got an error because another rank failed: its own failure is a consequence
    RANK.world         the rank has joined, and not yet left
    RANK.mpi           the rank has initialized MPI, and not yet reached the process's normal end, where it is finalized
    stopping           the launcher asks these ranks to end: the seconds that they have, and their numbers

Every rank of a job with a lost rank raises a `CollectiveError`, and may exit before the lost one does: the launcher
must not take its exit code for the cause. And an exit code of 0 is no success while something is open: such a rank
ended by `os._exit(0)`, or in a library's own exit, and others may wait for it. Without a launcher nothing happens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from bnlayer.environment import variable

FOLDER = "BNLAYER_LAUNCH_DIR"  # set by the launcher, for everything it starts

_PEER_FAILURE = "peer-failure"

# What must not be open at an exit with code 0, and what the rank should have done first.
OPEN = {"world": "leaving the job", "mpi": "the normal end that MPI needs"}


def mark(environ: Mapping[str, str] = os.environ) -> None:
    """Mark this rank as failing because of another's failure."""
    _write(environ, _PEER_FAILURE)


def recovered(environ: Mapping[str, str] = os.environ) -> None:
    """Take that back: this rank of an elastic job goes on."""
    closed(_PEER_FAILURE, environ)


def opened(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Mark one of `OPEN` as open; a forked child must not do it."""
    _write(environ, what)


def closed(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Remove that mark."""
    if (file := _file(environ, what)) is not None:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def forget(folder: Path, rank: int) -> None:
    """Remove what a rank has left: another process takes its place."""
    for what in (_PEER_FAILURE, *OPEN):
        with suppress(OSError):
            (folder / f"{rank}.{what}").unlink(missing_ok=True)


def is_marked(folder: Path, rank: int) -> bool:
    """Whether a rank is marked as failing because of another's failure."""
    return (folder / f"{rank}.{_PEER_FAILURE}").exists()


def stopping(folder: Path, seconds: float, ranks: Iterable[int]) -> None:
    """Say which ranks are asked to end, and how many seconds they have; read by `launcher/mpirank.py`."""
    new = folder / "stopping.new"
    with suppress(OSError):  # a full disk must not keep the signal back
        new.write_text(" ".join(map(str, (seconds, *ranks))))
        new.replace(folder / "stopping")


def left_open(folder: Path, rank: int) -> str:
    """What a rank should have done before it ended; "" if nothing."""
    return next((text for what, text in OPEN.items() if (folder / f"{rank}.{what}").exists()), "")


def _write(environ: Mapping[str, str], what: str) -> None:
    if (file := _file(environ, what)) is not None:
        with suppress(OSError):  # the launcher is on another host, or has ended: nothing reads the marks
            file.touch()


def _file(environ: Mapping[str, str], what: str) -> Path | None:
    folder, rank = variable(environ, FOLDER), variable(environ, "BNLAYER_RANK")
    return Path(folder, f"{rank}.{what}") if folder and rank else None
