"""What a rank says to its launcher beside its exit code, as empty files in the launcher's folder.

    RANK.peer-failure if I fail now, it is because I was told of another rank's failure
    RANK.world   I have joined, and not yet left
    RANK.mpi     I have initialized MPI, and not come to the process's normal end yet, where it is finalized

Every rank of a job with a lost rank raises a `CollectiveError`, and may be gone before the one it tells of. The
launcher must not take its exit code for the cause. And an exit code of 0 is no success while something is open: such
a rank ended by `os._exit(0)`, or in a library's own exit, and others may wait for it. Without a launcher nothing
happens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bnlayer.environment import variable

FOLDER = "BNLAYER_LAUNCH_DIR"  # set by the launcher, for everything it starts

_PEER_FAILURE = "peer-failure"
# What an end by exit code 0 must not leave open, and what should have come first.
OPEN = {"world": "leaving the job", "mpi": "the normal end that MPI needs"}


def mark(environ: Mapping[str, str] = os.environ) -> None:
    """Say that this rank was told of another's failure."""
    _write(environ, _PEER_FAILURE)


def opened(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Say that one of `OPEN` is; not for a forked child to say."""
    _write(environ, what)


def closed(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Say that it is not any more."""
    if (file := _file(environ, what)) is not None:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def is_marked(folder: Path, rank: int) -> bool:
    """Whether a rank was told of another's failure."""
    return (folder / f"{rank}.{_PEER_FAILURE}").exists()


def left_open(folder: Path, rank: int) -> str:
    """What a rank should have done before it ended; "" if nothing."""
    return next((text for what, text in OPEN.items() if (folder / f"{rank}.{what}").exists()), "")


def _write(environ: Mapping[str, str], what: str) -> None:
    if (file := _file(environ, what)) is not None:
        with suppress(OSError):  # the launcher is on another host, or gone: nobody listens
            file.touch()


def _file(environ: Mapping[str, str], what: str) -> Path | None:
    folder, rank = variable(environ, FOLDER), variable(environ, "BNLAYER_RANK")
    return Path(folder, f"{rank}.{what}") if folder and rank else None
