"""Ends what a launcher leaves behind: a process of its own, which outlives even a launcher killed with SIGKILL.

    python -I -S guardian.py VARIABLE=VALUE FOLDER < PIPE

Every process that a launcher starts, directly or through others, carries `VARIABLE=VALUE` in its environment.
The launcher holds the other end of the pipe. When the pipe ends, because the launcher ended (it says so with a
byte) or died in whatever way, everything that carries the variable is killed, and the launcher's folder
removed. Process groups would not do: mpiexec puts its ranks into sessions of their own.

Standard library alone: it must start in milliseconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

_STARTING_S = 0.1  # a process that the launcher was just starting when it died shows its variables by then
_PAUSE_S = 0.01  # between sweeps: time for the killed to go
_LIMIT_S = 10.0  # a process that the kernel does not let go of is not waited for longer


def carriers(mark: bytes) -> list[int]:
    """The pids of all processes whose environment holds the mark."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and _carries(entry, mark)]


def _carries(entry: Path, mark: bytes) -> bool:
    try:
        return mark in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or belongs to another user
        return False


def _kill(pid: int, mark: bytes) -> None:
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # Checked again with the handle open: the pid may have been reused meanwhile.
        if _carries(Path("/proc", str(pid)), mark):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def sweep(mark: bytes) -> None:
    """Kill every carrier of the mark, until there is none."""
    deadline = time.monotonic() + _LIMIT_S
    while (pids := carriers(mark)) and time.monotonic() < deadline:
        for pid in pids:
            _kill(pid, mark)
        time.sleep(_PAUSE_S)


def main() -> None:
    """Wait for the end of the pipe, then sweep."""
    mark = os.fsencode(sys.argv[1])
    orderly = sys.stdin.buffer.read()
    sweep(mark)
    if not orderly:
        time.sleep(_STARTING_S)
        sweep(mark)
    shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    main()
