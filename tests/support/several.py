"""Jobs on several hosts, and every way in which one can end: a row each of the table in docs/several-hosts.md."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.hosts import Host
from support.running import Running

PORT = 7431

JOINED = """\
import bnworker
def ready():
    print('ready', os.getpid(), os.environ['BNLAYER_LAUNCH_DIR'], flush=True)
with bnworker.join() as w:
    w.barrier()
"""
_EXCHANGES = "ready()\n    while True: w.barrier(); time.sleep(0.01)"
COMPUTES = "ready()\n    while True: time.sleep(0.05)"


class Job:
    """A launch on each of several hosts."""

    def __init__(
        self, on: Sequence[Host], program: Sequence[str], folder: Path, *, ranks: int = 2, options: Sequence[str] = ()
    ) -> None:
        where = [*options, "--insecure", f"--rendezvous={on[0].address}:{PORT}", f"--nnodes={len(on)}", "--grace=5"]
        self.nodes = [
            Running(ranks, program, [*where, f"--node-rank={node}"], folder / host.name, prefix=host.prefix)
            for node, host in enumerate(on)
        ]

    def end(self) -> list[int]:
        """The exit codes."""
        return [node.end() for node in self.nodes]

    def carriers(self) -> list[str]:
        """Everything that still runs, anywhere."""
        return [line for node in self.nodes for line in node.carriers()]

    def said(self) -> list[tuple[str, str]]:
        """stdout and stderr of each."""
        return [(node.out.all(), node.err.all()) for node in self.nodes]


ELASTIC = """\
import bnworker
def ready():
    print('ready', os.getpid(), os.environ['BNLAYER_LAUNCH_DIR'], flush=True)
state = bnworker.State(step=0)
for generation in bnworker.elastic(state):
    with generation as w:
        if generation.number == 1:
            w.barrier()
            ready()
"""


def _kill(number: int) -> Callable[[Job], None]:
    return lambda job: job.nodes[number].process.kill()


def _interrupt(number: int) -> Callable[[Job], None]:
    return lambda job: job.nodes[number].signal(signal.SIGINT)


def _kill_rank(job: Job) -> None:
    os.kill(job.nodes[1].ready()[3], signal.SIGKILL)


def _kill_service(job: Job) -> None:
    os.kill(job.nodes[0].backbone(), signal.SIGKILL)


@dataclass(frozen=True)
class Ending:
    """How a job on two hosts ends.

    Attributes:
        row: what the table in docs/launching.md calls it.
        codes: of the launchers on either host.
        act: what is done to it.
        body: of the ranks.
        says: what each launcher says, after its name.
    """

    row: str
    codes: tuple[int, int]
    act: Callable[[Job], None] = lambda _: None
    body: str = _EXCHANGES
    says: tuple[str, str] = ("", "")


LAUNCHER_LOST = "the launcher of node {} is gone: it was killed, or its host can't be reached"
_INTERRUPTED = ("SIGINT sent to ranks 0, 1", "SIGINT sent to ranks 2, 3")
ENDINGS = (
    Ending(
        "a rank on another host exits with code 7",
        (7, 7),
        body="ready()\n    w.barrier()\n    if rank == 2: sys.exit(7)\n    while True: w.barrier()",
        says=("rank 2 (two) exited with code 7", "rank 2 (two) exited with code 7"),
    ),
    Ending(
        "a rank on node 0 exits with code 7",
        (7, 7),
        body="ready()\n    w.barrier()\n    if rank == 0: sys.exit(7)\n    while True: w.barrier()",
        says=("rank 0 (one) exited with code 7", "rank 0 (one) exited with code 7"),
    ),
    Ending(
        "a rank is killed with SIGKILL",
        (137, 137),
        _kill_rank,
        says=("rank 3 (two) was killed by SIGKILL", "rank 3 (two) was killed by SIGKILL"),
    ),
    Ending(
        "the service is killed with SIGKILL",
        (137, 137),
        _kill_service,
        says=("the statistics service was killed by SIGKILL", "the statistics service was killed by SIGKILL"),
    ),
    Ending("the launcher of node 0 is killed with SIGKILL", (137, 137), _kill(0), says=("", LAUNCHER_LOST.format(0))),
    Ending(
        "the launcher of node 0 is killed with SIGKILL, and the ranks make no exchange",
        (137, 137),
        _kill(0),
        COMPUTES,
        ("", LAUNCHER_LOST.format(0)),
    ),
    Ending(
        "another node's launcher is killed with SIGKILL",
        (137, 137),
        _kill(1),
        says=(LAUNCHER_LOST.format("1 (two)"), ""),
    ),
    Ending("Ctrl-C (SIGINT) on node 0", (130, 130), _interrupt(0), says=_INTERRUPTED),
    Ending("Ctrl-C (SIGINT) on another node", (130, 130), _interrupt(1), says=_INTERRUPTED),
)
