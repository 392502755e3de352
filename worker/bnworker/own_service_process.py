"""Keeps the service of `own_service` until every rank has left: a process beside rank 0, which may end at any time.

    python own_service_process.py HOST:PORT [--insecure] < PIPE

It prints the address. When rank 0 writes to the pipe, or the pipe ends with it, the service gets no more ranks; it is
ended when no connection to it is left, but after `_LEAVING_S` at the latest.

Standard library alone: it must start in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_ESTABLISHED = "01"  # <net/tcp_states.h>
_LEAVING_S = 10.0
_PAUSE_S = 0.02
_DRAIN_S = 6.0  # the service drains within 5 s
_LISTENING = "bnserver listening on "


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _connected(port: int) -> bool:
    """Whether anything is connected to a port of this machine."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for row in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                local, state = row.split()[1], row.split()[3]
                if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False


def main() -> int:
    """Start the service, wait for rank 0 and then for the others, end it."""
    service = subprocess.Popen(
        [sys.executable, "-P", "-m", "bnserver", "--log-level", "warning", "--listen", *sys.argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has no threads
    )
    assert service.stdout is not None
    line = service.stdout.readline()
    if not line.startswith(_LISTENING):
        return service.wait() or 1
    address = line.removeprefix(_LISTENING).strip()
    print(address, flush=True)  # noqa: T201 - rank 0 reads it
    handle = os.pidfd_open(service.pid)
    select.select([0, handle], [], [])
    deadline = time.monotonic() + _LEAVING_S
    port = int(address.rpartition(":")[2])
    while service.poll() is None and _connected(port) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    service.terminate()
    try:
        return service.wait(_DRAIN_S)
    except subprocess.TimeoutExpired:
        service.kill()
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
