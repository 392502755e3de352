"""Jobs that are started over ssh, and every way in which one can end: a row each of docs/several-hosts.md."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bnworker.launcher import guardian
from support.processes import children
from support.running import Running
from support.several import COMPUTES

# Who is asked for in place of the second host, where nothing can be started.
NOBODY, STRANGER, MUTE = "nobody", "stranger", "mute"

_EXCHANGES = "ready()\n    while True: w.barrier(); time.sleep(0.01)"


@dataclass(frozen=True)
class Ending:
    """How it ends: in the table's words, the exit code, what is done, the ranks' program, and what stderr must say."""

    row: str
    code: int
    act: Callable[[Running], None] = lambda _: None
    body: str = _EXCHANGES
    says: str = ""


def _connections(job: Running) -> list[int]:
    """The ssh processes, node 0's first."""
    pids = children(job.process.pid)
    assert not any(guardian.__file__ in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)
    return sorted(pids)


def _kill_connection(number: int) -> Callable[[Running], None]:
    return lambda job: os.kill(_connections(job)[number], signal.SIGKILL)


ENDINGS = (
    Ending("all ranks succeed", 0, body="print('done')"),
    Ending(
        "a rank exits with code 7",
        7,
        body="ready()\n    w.barrier()\n    sys.exit(7 * (rank == 2))",
        says="bnlayer launch: rank 2 (two) exited with code 7",
    ),
    Ending(
        "Ctrl-C (SIGINT)", 130, lambda job: job.signal(signal.SIGINT), says="bnlayer launch: SIGINT sent to ranks 2, 3"
    ),
    Ending("SIGTERM", 143, lambda job: job.signal(signal.SIGTERM), COMPUTES),
    Ending("the launcher here is killed with SIGKILL", 137, lambda job: job.process.kill(), COMPUTES),
    Ending(
        "the ssh process to node 0 is killed with SIGKILL",
        137,
        _kill_connection(0),
        COMPUTES,
        "bnlayer launch: the connection to 10.77.0.2 was killed by SIGKILL",
    ),
    Ending(
        "the ssh process to another host is killed with SIGKILL",
        137,
        _kill_connection(1),
        COMPUTES,
        "bnlayer launch: the connection to 10.77.0.3 was killed by SIGKILL",
    ),
)


@dataclass(frozen=True)
class Unreached:
    """A host on which nothing can be started: in the table's words, which one, and what ssh says."""

    row: str
    host: str
    says: str


UNREACHED_CODE = 255  # ssh's own
UNREACHED = (
    Unreached("a host can't be reached", NOBODY, "ssh: connect to host .* port 2222: "),
    Unreached("a host refuses the key", STRANGER, r"Permission denied \(publickey"),
    Unreached("a host accepts the connection, and says nothing", MUTE, "Connection timed out during banner exchange"),
)
